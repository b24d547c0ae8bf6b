"""What a run trains for: everything in which pre-training and fine-tuning differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from lamda.config.schema import Config
from lamda.data.documents import Form
from lamda.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lamda.training.framework import Scorer
    from lamda.training.loop import Run


class Scores(Protocol):
    """What an evaluation found."""

    def metrics(self) -> dict[str, float]:
        """Its figures as they stand in metrics.jsonl, `eval/...`."""
        ...


class Evaluation(Protocol):
    """Held-out data of a run."""

    def score(self, model: Scorer, **how: Any) -> Scores:
        """Score the model; every rank calls it. `how`: as the keywords of `lamda.training.evaluation.evaluate`."""
        ...


class Task(Protocol):
    """What is handed to `lamda.training.train.train`."""

    def form(self, config: Config) -> Form:
        """What the records of the corpus are."""
        ...

    def held_out(self, config: Config, tokenizer: Tokenizer) -> Evaluation | None:
        """What the run is evaluated on, if anything."""
        ...

    def told(self, run: Run) -> Iterator[str]:
        """The last evaluation as lines for a person."""
        ...

    def sample(self, run: Run, tokenizer: Tokenizer) -> str:
        """Something that the trained model wrote; every rank calls it."""
        ...
