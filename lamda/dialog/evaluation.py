"""Evaluation on held-out dialogues: perplexity of responses, and AUC, accuracy and calibration of the ratings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lamda.console import Progress
from lamda.data.hashing import permutation
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import ATTRIBUTES
from lamda.dialog.encoding import Encoding, Example
from lamda.dialog.examples import Conversations, Rating, examples_in
from lamda.engines.protocol import Scorer
from lamda.inference.loading import load_model
from lamda.inference.sampling import check_finite
from lamda.model.loss import token_nll
from lamda.training.evaluation import TorchScorer
from lamda.training.inputs import saved_validation

BINS = 10
"""Bins of the expected calibration error."""
SAMPLES = 1000
"""Bootstrap samples of a confidence interval."""


def evaluate_checkpoint(
    path: Path, *, files: Sequence[str] | None, examples: int | None, length: int | None = None
) -> dict[str, Any]:
    """The report for a checkpoint. Raises UserError without dialogues, NotFiniteError if the model has diverged."""
    overrides = ["--data.sequence_length", str(length)] if length else []
    config, sources = saved_validation(path, files, *overrides, form_of=Conversations.of)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TorchScorer(load_model(path, config.model).to(device))
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    dialogues = HeldOutDialogues(HeldOut(sources, tokenizer, config.data.sequence_length, Conversations.of(config)))
    with torch.no_grad(), Progress("evaluating", total=dialogues.rows(examples), unit="examples") as shown:
        scores = dialogues.score(
            model, device=device, micro_batch=config.train.micro_batch_size, rows=examples, on_progress=shown.advance
        )
    check_finite(scores.nats, *(float(ratings.probabilities.sum()) for ratings in scores.ratings.values()))
    return {"checkpoint": str(path), **scores.report()}


@dataclass(frozen=True)
class EvalExample:
    """An encoded example. rating: the label of a rating. conversation: its index among the held-out ones."""

    kind: str
    example: Example
    rating: bool
    conversation: int


@dataclass(frozen=True)
class Ratings:
    """Per rating of one attribute: the model's P(1), the label, and the index of the conversation. [n] each."""

    probabilities: NDArray[np.float64]
    positive: NDArray[np.bool_]
    conversations: NDArray[np.int64]

    def metrics(self) -> dict[str, float]:
        """AUC, accuracy and expected calibration error."""
        measures = {"auc": auc, "accuracy": accuracy, "calibration_error": calibration_error}
        return {name: measure(self.probabilities, self.positive) for name, measure in measures.items()}

    def report(self) -> dict[str, Any]:
        """`metrics`, the 95% interval of AUC, the fraction of the majority class, and the size of both classes."""
        positives = int(self.positive.sum())
        majority = max(positives, len(self.positive) - positives) / len(self.positive)
        interval = auc_interval(self.probabilities, self.positive, self.conversations)
        counts = {"commoner_class": majority, "positives": positives, "negatives": len(self.positive) - positives}
        return {**self.metrics(), "auc_interval": interval, **counts}


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

    def report(self) -> dict[str, Any]:
        """All metrics, with the bootstrap intervals."""
        loss, perplexity = (self.loss(), self.perplexity()) if self.targets else (math.nan, math.nan)
        responses = {"loss": loss, "perplexity": perplexity, "tokens": self.targets}
        return {**responses, "attributes": {name: ratings.report() for name, ratings in self.ratings.items()}}

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
                rating = isinstance(example, Rating) and example.rating
                found.append(EvalExample(example.kind, encoded, rating, number))
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
        if each.kind in ATTRIBUTES:
            found[0, row] = of_ratings_BL2[row, mask, 1].item()
        else:
            found[:, row] = nll_BL[row, mask].sum(), mask.sum()
    return found


def _summed(examples: Sequence[EvalExample], found: NDArray[np.float64]) -> DialogScores:
    kinds = np.array([each.kind for each in examples])
    labels = np.array([each.rating for each in examples])
    conversations = np.array([each.conversation for each in examples])
    generative = ~np.isin(kinds, ATTRIBUTES)
    places: dict[str, NDArray[np.bool_]] = {name: kinds == name for name in ATTRIBUTES if name in kinds}
    ratings = {name: Ratings(found[0, at], labels[at], conversations[at]) for name, at in places.items()}
    return DialogScores(float(found[0, generative].sum()), int(found[1, generative].sum()), ratings)


def auc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney U): ties count half. [n] each; NaN if a class is absent."""
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(sizes) - (sizes - 1) / 2  # mean rank, from 1, of equal scores
    return float((rank[group][positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def auc_interval(
    scores: NDArray[np.float64], positive: NDArray[np.bool_], clusters: NDArray[np.int64], *, seed: int = 0
) -> tuple[float, float]:
    """A 95% interval of `auc` by the percentile bootstrap over clusters (conversations).

    Samples without both classes are dropped; NaN if no sample remains or there is only one cluster.
    """
    draw = np.random.default_rng(seed)
    _, cluster = np.unique(clusters, return_inverse=True)
    order = np.argsort(cluster, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(cluster))[:-1])
    if len(members) < 2:
        return float("nan"), float("nan")
    found = []
    for _ in range(SAMPLES):
        chosen = np.concatenate([members[place] for place in draw.integers(len(members), size=len(members))])
        found.append(auc(scores[chosen], positive[chosen]))
    kept = [value for value in found if not np.isnan(value)]
    low, high = np.percentile(kept, [2.5, 97.5]) if kept else (float("nan"), float("nan"))
    return float(low), float(high)


def accuracy(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """The fraction of labels that the likelier class predicts."""
    return float(((probabilities > 0.5) == positive).mean())


def calibration_error(probabilities: NDArray[np.float64], positive: NDArray[np.bool_]) -> float:
    """Expected calibration error: |mean probability - fraction of positives| over BINS equal bins, weighted by size."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = (abs(probabilities[place == bin].sum() - positive[place == bin].sum()) for bin in range(BINS))
    return float(sum(gap / len(positive) for gap in gaps))


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    loss, perplexity = report["loss"], report["perplexity"]
    if report["tokens"]:
        yield f"responses: {loss:.4f} nats per token, perplexity {perplexity:.2f} ({report['tokens']:,} tokens)"
    else:
        yield "responses: none among these examples"
    if report["attributes"]:
        heads = {"AUC": 7, "95% interval": 18, "accuracy": 10, "majority": 10, "ECE": 8, "of 1": 8, "of 0": 8}
        yield f"{'rating':14}" + "".join(f"{head:>{width}}" for head, width in heads.items())
    for name, part in report["attributes"].items():
        low, high = part["auc_interval"]
        area, without = ("-", "only one class") if math.isnan(part["auc"]) else (f"{part['auc']:.3f}", "too few")
        interval = without if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        yield (
            f"{name:14}{area:>7}{interval:>18}{part['accuracy']:10.3f}"
            f"{part['commoner_class']:10.3f}{part['calibration_error']:8.3f}{part['positives']:8,}{part['negatives']:8,}"
        )
