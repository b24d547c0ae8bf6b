"""`lamda plan`: what a run consists of, worked out before anything is started."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lamda.config.batches import micro_batches_per_rank
from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.model.counts import flops_per_token, parameters, parameters_by_part


def main(argv: list[str]) -> int:
    """`[--gpus N] [--json] --config FILE [--section.key VALUE ...]`; raises UserError."""
    parser = argparse.ArgumentParser(prog="lamda plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    planned = plan(load_config(rest), gpus=options.gpus)
    print(json.dumps(planned, indent=2) if options.json else _table(planned))
    return 0


def plan(config: Config, *, gpus: int) -> dict[str, Any]:
    """Parameters by part, FLOPs of training and the arithmetic of batches on `gpus` ranks.

    Raises UserError where that number of ranks cannot share the batch, naming the nearest that can.
    """
    if gpus < 1:
        raise UserError(f"--gpus: a run needs at least 1 rank, not {gpus}")
    train, length = config.train, config.data.sequence_length
    tokens_per_step = train.global_batch_size * length
    flops = flops_per_token(config.model, length)
    return {
        "parameters": parameters(config.model),
        "parameters_by_part": parameters_by_part(config.model),
        "gpus": gpus,
        "micro_batch_size": train.micro_batch_size,
        "gradient_accumulation": micro_batches_per_rank(train, world=gpus),
        "global_batch_size": train.global_batch_size,
        "sequence_length": length,
        "tokens_per_step": tokens_per_step,
        "steps": config.steps,
        "tokens": config.steps * tokens_per_step,
        "flops_per_token": flops,
        "flops": flops * config.steps * tokens_per_step,
    }


def _table(planned: dict[str, Any]) -> str:
    lines = [("parameters", f"{planned['parameters']:,}")]
    lines += [(f"  {part}", f"{count:,}") for part, count in planned["parameters_by_part"].items()]
    lines += [
        ("ranks", f"{planned['gpus']:,}"),
        ("rows a rank and micro-batch", f"{planned['micro_batch_size']:,}"),
        ("micro-batches a rank and step", f"{planned['gradient_accumulation']:,}"),
        ("rows a step", f"{planned['global_batch_size']:,}"),
        ("tokens a row", f"{planned['sequence_length']:,}"),
        ("tokens a step", f"{planned['tokens_per_step']:,}"),
        ("steps", f"{planned['steps']:,}"),
        ("tokens", f"{planned['tokens']:,}"),
        ("training FLOPs a token", f"{planned['flops_per_token']:.4g}"),
        ("training FLOPs", f"{planned['flops']:.4g}"),
    ]
    wide, high = (max(len(line[column]) for line in lines) for column in (0, 1))
    return "\n".join(f"{name:<{wide}}  {value:>{high}}" for name, value in lines)
