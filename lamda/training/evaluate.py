"""`lamda evaluate`: a saved model's loss, perplexity and bits per byte on text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import orjson
import torch

from lamda.config.errors import UserError
from lamda.console import Progress
from lamda.data.card import load_card
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.inference.loading import find_checkpoint, load_model, saved_config
from lamda.training.evaluation import HeldOutText, LoadedModel, table
from lamda.training.run_log import each_bad_line_once


def main(argv: list[str]) -> int:
    """`RUN_OR_CHECKPOINT [--files GLOB] [--json]`; without --files the run's own validation text."""
    parser = argparse.ArgumentParser(prog="lamda evaluate", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path)
    parser.add_argument("--files", metavar="GLOB", help="text in place of the run's validation files")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(argv)
    report = evaluate_checkpoint(find_checkpoint(options.path), files=options.files)
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode() if options.json else "\n".join(table(report)))
    return 0


def evaluate_checkpoint(path: Path, *, files: str | None) -> dict[str, Any]:
    """The report of `Scores.report` for a checkpoint, with its path. Raises UserError where there is no text."""
    config = saved_config(path, *([] if files is None else ["--data.eval_files", files]))
    sources = load_card(config.data).validation
    if not sources:
        raise UserError(f"{path}: its run has no validation text; give --files")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LoadedModel(load_model(path, config.model).to(device))
    text = HeldOut(
        sources,
        Tokenizer.load(path / "tokenizer.model"),
        config.data.sequence_length,
        document_mask=config.data.separates_documents,
    )
    held_out = HeldOutText(text)
    with (
        torch.no_grad(),
        each_bad_line_once(),  # the rows are counted first
        Progress("evaluating", total=held_out.rows(None), unit="rows") as shown,
    ):
        scores = held_out.score(model, device=device, micro_batch=config.train.micro_batch_size, scored=shown.advance)
    if not scores.utf8_bytes.sum():
        raise UserError(f"there is no text to score: {files or 'data.eval_files'} has empty documents alone")
    return {"checkpoint": str(path), **scores.report()}
