"""The muP coordinate check (arXiv 2203.03466): do a few steps change activations equally at every width?

A learning rate transfers from a narrow to a wide model if a step changes both by the same amount. Every width is
trained for the same steps on the same tokens, and the change of hidden states and logits is fitted to a power of the
width: the exponent is 0 if all widths change equally, and 0.5 or 1 if wide models change more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from torch.nn import functional

from benchmarks import new_parser, report
from lamda.config import ModelConfig
from lamda.config.schema import OptimizerName, TrainConfig
from lamda.engines.deepspeed.optimizer import make_optimizer, set_learning_rate, without_compile
from lamda.model import LaMDA
from lamda.model.initialization import initialize_weights

PACKAGES = ("torch", "deepspeed")
WIDTHS = (128, 256, 512, 1024)
D_HEAD, VOCABULARY, LAYERS = 32, 256, 3
ROWS, LENGTH = 4, 64
WATCHED = ("attention", "feed-forward", "stream", "logits")


def main(argv: list[str]) -> int:
    """See `--help`. Raises UserError."""
    parser = new_parser("coordinates")
    parser.add_argument("--optimizer", choices=get_args(OptimizerName), nargs="+", default=["adamw"])
    parser.add_argument("--lr", type=float, default=4e-3, help="at the lowest width (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of training (%(default)s)")
    options = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        found = {
            optimizer: {
                name: check(optimizer, lr=options.lr, steps=options.steps, base_width=base)
                for name, base in (("as given", None), ("base_width", min(WIDTHS)))
            }
            for optimizer in options.optimizer
        }
        return {"widths": WIDTHS, "optimizers": found}

    return report(options, ["coordinates", *argv], PACKAGES, measured, table)


def check(
    optimizer: OptimizerName, *, lr: float, steps: int, base_width: int | None, widths: Sequence[int] = WIDTHS
) -> dict[str, Any]:
    """For each of WATCHED: the RMS of its change at every width, and the fitted exponent of the width."""
    train = TrainConfig(steps=steps, optimizer=optimizer, lr=lr, base_width=base_width, weight_decay=0)
    moved = [changes(width, train, steps=steps) for width in widths]
    return {
        name: {"rms": (sizes := [each[name] for each in moved]), "exponent": exponent(widths, sizes)}
        for name in WATCHED
    }


def exponent(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The slope of log(size) over log(width), by least squares."""
    return float(np.polyfit(np.log(widths), np.log(sizes), 1)[0])


def changes(width: int, train: TrainConfig, *, steps: int) -> dict[str, float]:
    """The RMS change of the last block and the logits by `steps` steps on one batch of random tokens."""
    model = LaMDA(
        ModelConfig(
            vocab_size=VOCABULARY,
            d_model=width,
            n_layers=LAYERS,
            n_heads=width // D_HEAD,
            d_head=D_HEAD,
            d_ff=4 * width,
        )
    )
    initialize_weights(model, seed=0, base_width=train.base_width)
    draw = torch.Generator().manual_seed(0)
    ids_BL = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=draw)
    before = watch(model, ids_BL[:, :-1])
    optimizer = make_optimizer(model, train)
    set_learning_rate(optimizer, train.lr)
    for _ in range(steps):
        optimizer.zero_grad()
        logits_BLV = model(ids_BL[:, :-1])
        functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten()).backward()
        with without_compile(train):
            optimizer.step()
    after = watch(model, ids_BL[:, :-1])
    return {name: float((after[name] - before[name]).square().mean().sqrt()) for name in WATCHED}


@torch.no_grad()
def watch(model: LaMDA, tokens_BL: torch.Tensor) -> dict[str, torch.Tensor]:
    """The outputs of both halves of the last block, the residual stream after it, and the logits."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, module: Any) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(lambda _module, _inputs, output: seen.__setitem__(name, output.clone()))

    last = model.layers[-1]
    watched = zip(WATCHED, (last.attention, last.feed_forward, last), strict=False)
    handles = [keep(name, module) for name, module in watched]
    seen["logits"] = model(tokens_BL)
    for handle in handles:
        handle.remove()
    return seen


def table(report: dict[str, Any]) -> str:
    """The exponents, one row per optimizer and setting."""
    lines = [f"{'exponent of the width':24}" + "".join(f"{name:>14}" for name in WATCHED)]
    for optimizer, settings in report["optimizers"].items():
        for setting, rows in settings.items():
            cells = "".join(f"{rows[name]['exponent']:14.2f}" for name in WATCHED)
            lines.append(f"{optimizer + ', ' + setting:24}" + cells)
    return "\n".join(lines)
