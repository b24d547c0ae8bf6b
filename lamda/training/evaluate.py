"""Loss, perplexity and bits per byte of a saved model on text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lamda.config.errors import UserError
from lamda.console import Progress
from lamda.data.card import load_card
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.inference.loading import load_model, saved_config
from lamda.training.evaluation import HeldOutText, LoadedModel
from lamda.training.run_log import each_bad_line_once


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
