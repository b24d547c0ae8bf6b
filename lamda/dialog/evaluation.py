"""Held-out dialogues: the perplexity of responses, and how well each attribute's ratings are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import orjson
import torch
from numpy.typing import NDArray

from lamda.data.hashing import permutation
from lamda.data.held_out import HeldOut
from lamda.dialog.conversation import ATTRIBUTES, parse_conversation
from lamda.dialog.discrimination import accuracy, auc, auc_interval, calibration_error
from lamda.dialog.encoding import Encoding, Example
from lamda.dialog.examples import Rating, examples_of
from lamda.engines.protocol import Scorer
from lamda.model.loss import token_nats


@dataclass(frozen=True)
class Item:
    """An encoded example. rating: the truth of a rating. conversation: its number among the held-out ones."""

    kind: str
    example: Example
    rating: bool
    conversation: int


@dataclass(frozen=True)
class Ratings:
    """The model's P(1) of each rating of an attribute, the truth, and the conversation it is from: [n] each."""

    probabilities: NDArray[np.float64]
    positive: NDArray[np.bool_]
    conversations: NDArray[np.int64]

    def figures(self) -> dict[str, float]:
        """AUC, accuracy and expected calibration error."""
        return {
            "auc": auc(self.probabilities, self.positive),
            "accuracy": accuracy(self.probabilities, self.positive),
            "calibration_error": calibration_error(self.probabilities, self.positive),
        }

    def report(self) -> dict[str, Any]:
        """All figures: AUC's 95% interval, the share of the commoner class, and the numbers of both, too."""
        positives = int(self.positive.sum())
        commoner = max(positives, len(self.positive) - positives) / len(self.positive)
        interval = auc_interval(self.probabilities, self.positive, self.conversations)
        counts = {"commoner_class": commoner, "positives": positives, "negatives": len(self.positive) - positives}
        return {**self.figures(), "auc_interval": interval, **counts}


@dataclass(frozen=True)
class DialogScores:
    """Nats and number of targets of all responses (and research steps), and ratings by attribute."""

    nats: float
    targets: int
    ratings: dict[str, Ratings]

    def metrics(self) -> dict[str, float]:
        """`eval/loss`, `eval/perplexity`, and `eval/auc/<attribute>` and the like."""
        told = {"eval/loss": self.loss(), "eval/perplexity": self.perplexity()} if self.targets else {}
        for name, ratings in self.ratings.items():
            told |= {f"eval/{figure}/{name}": value for figure, value in ratings.figures().items()}
        return told

    def report(self) -> dict[str, Any]:
        """All figures, with the intervals that take a moment to compute."""
        loss, perplexity = (self.loss(), self.perplexity()) if self.targets else (math.nan, math.nan)
        responses = {"loss": loss, "perplexity": perplexity, "tokens": self.targets}
        return {**responses, "attributes": {name: ratings.report() for name, ratings in self.ratings.items()}}

    def loss(self) -> float:
        """Nats a target of responses and research steps."""
        return self.nats / self.targets

    def perplexity(self) -> float:
        """e to the loss; infinite where no number holds it."""
        try:
            return math.exp(self.loss())
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class HeldOutDialogues:
    """Validation dialogues as a run's evaluation (`lamda.training.task.Evaluation`)."""

    text: HeldOut

    @cached_property
    def items(self) -> list[Item]:
        """Every example of every conversation, in an order that mixes them."""
        encoding, found = Encoding(self.text.tokenizer), []
        for number, document in enumerate(self.text.documents()):
            generative, ratings = examples_of(parse_conversation(orjson.loads(document.text)))
            for example in (*generative, *ratings):
                encoded = example.encode(encoding, max_tokens=self.text.sequence_length + 1)
                rating = isinstance(example, Rating) and example.rating
                found.append(Item(example.kind, encoded, rating, number))
        return [found[place] for place in permutation(len(found), 0)]

    def rows(self, limit: int | None) -> Sequence[object]:
        """See `lamda.training.task.Evaluation`."""
        return self.items[:limit]

    def score(
        self,
        model: Scorer,
        *,
        device: torch.device,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        rows: int | None = None,
        total: Callable[[NDArray[np.float64]], NDArray[np.float64]] = lambda sums: sums,
        scored: Callable[[int], object] = lambda examples: None,
    ) -> DialogScores:
        """Score the first `rows` examples (default: all), shared among the ranks; keywords as for text.

        Ranks without a batch run one again, since the model's collectives (ZeRO-3) need every rank.
        """
        items = self.items[:rows]
        order = sorted(range(len(items)), key=lambda place: len(items[place].example.ids))
        batches = [order[start : start + micro_batch] for start in range(0, len(order), micro_batch)]
        ratings_ids = Encoding(self.text.tokenizer).rating_ids
        found = np.zeros((2, len(items)))
        for first in range(0, len(batches), world):
            batch = batches[min(first + rank, len(batches) - 1)]
            values = _score([items[place] for place in batch], model, ratings_ids, device=device)
            if first + rank < len(batches):
                found[:, batch] = values
                scored(len(batch))
        return _summed(items, total(found))


def _score(
    items: Sequence[Item], model: Scorer, rating_ids: tuple[int, int], *, device: torch.device
) -> NDArray[np.float64]:
    """[2, n]: of a rating P(1) and 1, of another example its nats and its number of targets."""
    longest = max(len(item.example.ids) for item in items)
    ids, scored = np.zeros((len(items), longest), np.int64), np.zeros((len(items), longest), bool)
    for row, item in enumerate(items):
        ids[row, : len(item.example.ids)], scored[row, : len(item.example.ids)] = item.example
    tokens_BL = torch.from_numpy(ids).to(device)
    logits_BLV = model.logits(tokens_BL[:, :-1])
    nats_BL = token_nats(logits_BLV, tokens_BL[:, 1:]).double().cpu().numpy()
    of_ratings_BL2 = logits_BLV[:, :, list(rating_ids)].double().softmax(-1).cpu().numpy()
    found = np.ones((2, len(items)))
    for row, item in enumerate(items):
        mask = scored[row, 1:]
        if item.kind in ATTRIBUTES:
            found[0, row] = of_ratings_BL2[row, mask, 1].item()
        else:
            found[:, row] = nats_BL[row, mask].sum(), mask.sum()
    return found


def _summed(items: Sequence[Item], found: NDArray[np.float64]) -> DialogScores:
    kinds = np.array([item.kind for item in items])
    truths = np.array([item.rating for item in items])
    conversations = np.array([item.conversation for item in items])
    written = ~np.isin(kinds, ATTRIBUTES)
    ratings = {}
    for name in ATTRIBUTES:
        own = kinds == name
        if own.any():
            ratings[name] = Ratings(found[0, own], truths[own], conversations[own])
    return DialogScores(float(found[0, written].sum()), int(found[1, written].sum()), ratings)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines for a person."""
    loss, perplexity = report["loss"], report["perplexity"]
    if report["tokens"]:
        yield f"responses: {loss:.4f} nats a token, perplexity {perplexity:.2f} ({report['tokens']:,} tokens)"
    else:
        yield "responses: none among these examples"
    if report["attributes"]:
        heads = {"AUC": 7, "95% interval": 18, "accuracy": 10, "commoner": 10, "ECE": 8, "of 1": 8, "of 0": 8}
        yield f"{'rating':14}" + "".join(f"{head:>{width}}" for head, width in heads.items())
    for name, part in report["attributes"].items():
        low, high = part["auc_interval"]
        area, without = ("-", "one class alone") if math.isnan(part["auc"]) else (f"{part['auc']:.3f}", "too few")
        interval = without if math.isnan(low) else f"{low:.3f} to {high:.3f}"
        yield (
            f"{name:14}{area:>7}{interval:>18}{part['accuracy']:10.3f}"
            f"{part['commoner_class']:10.3f}{part['calibration_error']:8.3f}{part['positives']:8,}{part['negatives']:8,}"
        )
