"""Evaluation on held-out dialogues: perplexity of responses, and AUC, accuracy and calibration of the ratings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.console import Progress
from lamda.data.card import load_card
from lamda.data.hashing import permutation
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.calibration import CALIBRATION, Calibration
from lamda.dialog.conversation import ATTRIBUTES
from lamda.dialog.encoding import Encoding, Example
from lamda.dialog.examples import Conversations, Rating, ResearchStep, Response, examples_in
from lamda.dialog.ratings import Ratings
from lamda.engines.protocol import Scorer
from lamda.inference.loading import load_model
from lamda.inference.sampling import check_finite
from lamda.model.loss import token_nll
from lamda.storage.commit import add_file
from lamda.training.evaluation import TorchScorer
from lamda.training.inputs import saved_validation


def evaluate_checkpoint(
    path: Path,
    *,
    files: Sequence[str] | None,
    examples: int | None,
    length: int | None = None,
    false_refusals: float | None = None,
    with_baselines: bool = False,
) -> dict[str, Any]:
    """The report for a checkpoint. Raises UserError without dialogues, NotFiniteError if the model has diverged.

    false_refusals: calibrate to this share on the dialogues, of which some must be rated, and store the calibration in
    the checkpoint.
    """
    overrides = ["--data.sequence_length", str(length)] if length is not None else []
    config, sources = saved_validation(path, files, *overrides, form_of=Conversations.of)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TorchScorer(load_model(path, config.model).to(device))
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    dialogues = HeldOutDialogues(HeldOut(sources, tokenizer, config.data.sequence_length, Conversations.of(config)))
    _check(path, dialogues.examples[:examples], calibrates=false_refusals is not None)
    calibration = None if false_refusals is not None else Calibration.read(path)
    compared = _baselines(config, dialogues, examples) if with_baselines else {}
    with torch.no_grad(), Progress("evaluating", total=dialogues.rows(examples), unit="examples") as shown:
        scores = dialogues.score(
            model, device=device, micro_batch=config.train.micro_batch_size, rows=examples, on_progress=shown.advance
        )
    check_finite(scores.nats, *(float(ratings.probabilities.sum()) for ratings in scores.ratings.values()))
    if false_refusals is not None:
        calibration = Calibration.of(scores.ratings, false_refusals=false_refusals)
        add_file(path, CALIBRATION, calibration.model_dump_json(indent=1))
    report = {"checkpoint": str(path), **scores.report(calibration)}
    for name, figures in compared.items():
        report["attributes"][name]["baselines"] = figures
    return report


def _check(path: Path, examples: Sequence[EvalExample], *, calibrates: bool) -> None:
    """Raise UserError if there is nothing to evaluate, or to calibrate on, or a calibration cannot be stored."""
    if not examples:
        raise UserError("there is nothing to evaluate: no conversation has a response or a rating")
    if calibrates and not any(isinstance(each.source, Rating) for each in examples):
        raise UserError("--calibrate: none of these responses is rated; give --files with ratings")
    if calibrates and not os.access(path, os.W_OK):
        raise UserError(f"--calibrate: {path} is read-only, and the calibration is stored there; give a copy")


def _baselines(config: Config, dialogues: HeldOutDialogues, examples: int | None) -> dict[str, dict[str, Any]]:
    """`lamda.dialog.baselines.baselines` on the same examples; held-out conversations are left out of training."""
    from lamda.dialog.baselines import baselines

    held_out = {document.text for document in dialogues.text.documents()}
    training = replace(dialogues.text, sources=load_card(config.data).sources).documents()
    asked = [(each.source, each.conversation) for each in dialogues.examples[:examples]]
    rated = [(source, number) for source, number in asked if isinstance(source, Rating)]
    return baselines((document for document in training if document.text not in held_out), rated)


@dataclass(frozen=True)
class EvalExample:
    """An example and its encoding. conversation: its index among the held-out ones."""

    source: Response | ResearchStep | Rating
    example: Example
    conversation: int


@dataclass(frozen=True)
class DialogScores:
    """Summed nats and number of target tokens of all responses and research steps, and ratings by attribute."""

    nats: float
    targets: int
    ratings: dict[str, Ratings]

    def metrics(self) -> dict[str, float]:
        """`eval/loss`, `eval/perplexity`, `eval/auc/<attribute>` and so on, as in metrics.jsonl."""
        values = {"eval/loss": self.loss(), "eval/perplexity": self.perplexity()} if self.targets else {}
        for attribute, ratings in self.ratings.items():
            values |= {f"eval/{name}/{attribute}": value for name, value in ratings.metrics().items()}
        return values

    def report(self, calibration: Calibration | None = None) -> dict[str, Any]:
        """All metrics, with the bootstrap intervals, and what the calibration makes of them."""
        loss, perplexity = (self.loss(), self.perplexity()) if self.targets else (math.nan, math.nan)
        responses = {"loss": loss, "perplexity": perplexity, "tokens": self.targets}
        attributes = {name: ratings.report() for name, ratings in self.ratings.items()}
        for name, calibrated in ({} if calibration is None else calibration.report(self.ratings)).items():
            attributes[name]["calibrated"] = calibrated
        return {**responses, "attributes": attributes, "filter": calibration and calibration.filter_note}

    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.targets

    def perplexity(self) -> float:
        """exp(loss); infinite on overflow."""
        try:
            return math.exp(self.loss())
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class HeldOutDialogues:
    """Validation dialogues as a run's evaluation (`lamda.training.task.Evaluation`)."""

    text: HeldOut

    @cached_property
    def examples(self) -> list[EvalExample]:
        """Every example of every conversation, in a fixed random order."""
        encoding, found = Encoding(self.text.tokenizer), []
        for number, document in enumerate(self.text.documents()):
            generative, ratings = examples_in(document)
            for example in (*generative, *ratings):
                encoded = example.encode(encoding, max_tokens=self.text.sequence_length + 1)
                found.append(EvalExample(example, encoded, number))
        return [found[place] for place in permutation(len(found), 0)]

    def rows(self, limit: int | None) -> Sequence[object]:
        """See `lamda.training.task.Evaluation`."""
        return self.examples[:limit]

    def score(
        self,
        model: Scorer,
        *,
        device: torch.device,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        rows: int | None = None,
        total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda sums: sums,
        on_progress: Callable[[int], object] = lambda examples: None,
    ) -> DialogScores:
        """Score the first `rows` examples (default: all), divided among the ranks; keywords as for text.

        A rank without a batch repeats the last one: every rank must join the model's collectives (ZeRO-3).
        """
        examples = self.examples[:rows]
        order = sorted(range(len(examples)), key=lambda place: len(examples[place].example.ids))
        batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
        rating_ids = Encoding(self.text.tokenizer).rating_ids
        found = np.zeros((2, len(examples)))
        for first in range(0, len(batches), world_size):
            batch = batches[min(first + rank, len(batches) - 1)]
            values = _score([examples[place] for place in batch], model, rating_ids, device=device)
            if first + rank < len(batches):
                found[:, batch] = values
                on_progress(len(batch))
        return _summed(examples, total(found))


def _score(
    examples: Sequence[EvalExample], model: Scorer, rating_ids: tuple[int, int], *, device: torch.device
) -> NDArray[np.float64]:
    """[2, n]: P(1) and 1 for a rating, summed nats and number of target tokens for another example."""
    longest = max(len(each.example.ids) for each in examples)
    ids, loss_mask = np.zeros((len(examples), longest), np.int64), np.zeros((len(examples), longest), bool)
    for row, each in enumerate(examples):
        ids[row, : len(each.example.ids)], loss_mask[row, : len(each.example.ids)] = each.example
    tokens_BL = torch.from_numpy(ids).to(device)
    logits_BLV = model.logits(tokens_BL[:, :-1])
    nll_BL = token_nll(logits_BLV, tokens_BL[:, 1:]).double().cpu().numpy()
    of_ratings_BL2 = logits_BLV[:, :, list(rating_ids)].double().softmax(-1).cpu().numpy()
    found = np.ones((2, len(examples)))
    for row, each in enumerate(examples):
        mask = loss_mask[row, 1:]
        if isinstance(each.source, Rating):
            found[0, row] = of_ratings_BL2[row, mask, 1].item()
        else:
            found[:, row] = nll_BL[row, mask].sum(), mask.sum()
    return found


def _summed(examples: Sequence[EvalExample], found: NDArray[np.float64]) -> DialogScores:
    kinds = np.array([each.source.kind for each in examples])
    labels = np.array([isinstance(each.source, Rating) and each.source.rating for each in examples])
    conversations = np.array([each.conversation for each in examples])
    generative = ~np.isin(kinds, ATTRIBUTES)
    places: dict[str, NDArray[np.bool_]] = {name: kinds == name for name in ATTRIBUTES if name in kinds}
    ratings = {name: Ratings(found[0, at], labels[at], conversations[at]) for name, at in places.items()}
    return DialogScores(float(found[0, generative].sum()), int(found[1, generative].sum()), ratings)
