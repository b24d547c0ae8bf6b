"""`lamda dialog evaluate`: a saved model on held-out dialogues; before fine-tuning, too."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.console import Progress


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dialog evaluate`."""
    parser = argparse.ArgumentParser(prog="lamda dialog evaluate", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or this one")
    parser.add_argument("--files", metavar="GLOB", help="conversations instead of the run's validation files")
    parser.add_argument("--examples", metavar="N", type=int, help="number of examples, shuffled; default: all")
    parser.add_argument("--length", metavar="L", type=int, help="row length, to compare runs that differ in it")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`RUN_OR_CHECKPOINT [--files GLOB] [--examples N] [--length L] [--json]`; by default the run's own dialogues."""
    options = parser().parse_args(argv)
    if options.examples is not None and options.examples < 1:
        raise UserError(f"--examples {options.examples}: give a number of at least 1")
    from lamda.dialog.evaluation import table
    from lamda.inference.loading import find_checkpoint

    report = evaluate_checkpoint(
        find_checkpoint(options.path), files=options.files, examples=options.examples, length=options.length
    )
    print(json.dumps(_finite(report), indent=1, allow_nan=False) if options.json else "\n".join(table(report)))
    return 0


def _finite(value: Any) -> Any:
    """The report with null for what is no number, as where an attribute has ratings of one class alone."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate_checkpoint(
    path: Path, *, files: str | None, examples: int | None, length: int | None = None
) -> dict[str, Any]:
    """The report of `DialogScores` for a checkpoint, with its path.

    Raises UserError where there is no dialogue, and NotFiniteError where the model has diverged.
    """
    import torch

    from lamda.data.card import load_card
    from lamda.data.held_out import HeldOut
    from lamda.data.tokenizer import Tokenizer
    from lamda.dialog.evaluation import HeldOutDialogues
    from lamda.dialog.examples import Conversations
    from lamda.inference.loading import load_model, saved_config
    from lamda.inference.sampling import check_finite
    from lamda.training.evaluation import LoadedModel

    overrides = [] if files is None else ["--data.eval_files", files]
    overrides += ["--data.sequence_length", str(length)] if length else []
    config = saved_config(path, *overrides)
    sources = load_card(config.data).validation
    if not sources:
        raise UserError(f"{path}: its run has no validation dialogues; give --files")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LoadedModel(load_model(path, config.model).to(device))
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    held_out = HeldOut(sources, tokenizer, config.data.sequence_length, Conversations.of(config))
    dialogues = HeldOutDialogues(held_out)
    with torch.no_grad(), Progress("evaluating", total=dialogues.rows(examples), unit="examples") as shown:
        scores = dialogues.score(
            model, device=device, micro_batch=config.train.micro_batch_size, rows=examples, scored=shown.advance
        )
    check_finite(scores.nats, *(float(ratings.probabilities.sum()) for ratings in scores.ratings.values()))
    return {"checkpoint": str(path), **scores.report()}
