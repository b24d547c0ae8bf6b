"""How often the number of ranks changes fp32 sums of bf16 gradients, through the order of summation.

A rank adds its micro-batches in sequence, and then the sums of the ranks are added. A sum of bf16 numbers is exact in
fp32, and so independent of the order, as long as their exponents are close together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import new_parser, report
from benchmarks.data_stages import micro_batches
from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.tokenizer import Tokenizer
from lamda.inference.loading import find_checkpoint, load_model, saved_config
from lamda.model import LaMDA
from lamda.model.loss import token_losses

PACKAGES = ("torch",)
CHUNK = 1 << 22
"""Elements compared at a time."""


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("summation")
    parser.add_argument("paths", metavar="RUN_OR_CHECKPOINT", type=Path, nargs="+")
    parser.add_argument("--micro-batches", type=int, default=16, help="of a step (%(default)s)")
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        if options.micro_batches < 1:
            raise UserError(f"--micro-batches: a step has at least 1, not {options.micro_batches}")
        return {"checkpoints": [measure(find_checkpoint(path), count=options.micro_batches) for path in options.paths]}

    return report(options, ["summation", *argv], PACKAGES, measured, table)


def measure(path: Path, *, count: int) -> dict[str, Any]:
    """Elements of the gradient of a step whose sum depends on the number of ranks, by number of micro-batches."""
    config = saved_config(path)
    model = load_model(path, config.model).to(torch.bfloat16).train()
    gradients_MN = torch.stack(list(_gradients(model, config, Tokenizer.load(path / "tokenizer.model"), count)))
    return {
        "step": int(re.sub(r"\D", "", path.name) or 0),
        "elements": gradients_MN.shape[1],
        "by_micro_batches": {number: compare(gradients_MN[:number]) for number in _powers_of_two(count)},
    }


def _gradients(model: LaMDA, config: Config, tokenizer: Tokenizer, count: int) -> Sequence[torch.Tensor]:
    """[N] bf16 gradients of micro-batches of the run's own text."""
    found = []
    with closing(micro_batches(config, tokenizer)) as batches:
        for ids in islice(batches, count):
            ids_BL = torch.from_numpy(ids.astype("int64"))
            nll_BL, log_z_BL = token_losses(model(ids_BL[:, :-1]), ids_BL[:, 1:])
            loss = (nll_BL + config.train.z_loss * log_z_BL.square()).mean()
            found.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, tuple(model.parameters()))]))
    return found


def compare(gradients_MN: torch.Tensor) -> dict[str, Any]:
    """Elements that differ: from the sum on one rank; from the exact sum; in float64, on any number of ranks."""
    numbers = _powers_of_two(len(gradients_MN))
    ranks, rounded, wide = dict.fromkeys(numbers, 0), 0, 0
    for parts_MN in gradients_MN.split(CHUNK, dim=1):
        alone_N, wide_MN = added_up(parts_MN), parts_MN.double()
        exact_N = added_up(wide_MN)
        rounded += _differing(alone_N, exact_N.float())
        wide += max(_differing(on_ranks(wide_MN, number), exact_N) for number in numbers)
        for number in numbers:
            ranks[number] += _differing(on_ranks(parts_MN, number), alone_N)
    return {"ranks": ranks, "rounded": rounded, "float64_on_ranks": wide}


def added_up(parts_MN: torch.Tensor) -> torch.Tensor:
    """The sequential sum in fp32 or wider: [N]."""
    total_N = torch.zeros_like(parts_MN[0], dtype=torch.promote_types(parts_MN.dtype, torch.float32))
    for part_N in parts_MN:
        total_N += part_N
    return total_N


def on_ranks(parts_MN: torch.Tensor, ranks: int) -> torch.Tensor:
    """The sum over ranks with equal shares of the micro-batches: each share first, then over ranks. [N]."""
    return added_up(torch.stack([added_up(part) for part in parts_MN.chunk(ranks)]))


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one != other).sum())


def _powers_of_two(highest: int) -> list[int]:
    return [1 << power for power in range(highest.bit_length()) if 1 << power <= highest]


def table(report: dict[str, Any]) -> str:
    """One row per checkpoint and number of micro-batches: elements per million that depend on the order."""
    found = report["checkpoints"]
    highest = max(int(number) for each in found for number in each["by_micro_batches"])
    ranks = [number for number in _powers_of_two(highest) if number > 1]
    lines = ["elements in a million whose fp32 sum is not that of 1 rank", ""]
    lines.append(
        " | ".join(["step", "elements", "micro-batches", *(f"{number} ranks" for number in ranks), "float64, any"])
    )
    for each in found:
        millions = each["elements"] / 1e6
        for count, row in each["by_micro_batches"].items():
            found_by_ranks = [row["ranks"].get(str(number)) for number in ranks]
            cells = ["" if value is None else f"{value / millions:.2f}" for value in found_by_ranks]
            last = f"{row['float64_on_ranks'] / millions:.2f}"
            lines.append(" | ".join([str(each["step"]), f"{each['elements']:,}", count, *cells, last]))
    return "\n".join(lines)
