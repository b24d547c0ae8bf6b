"""What a run trains for: everything in which pre-training and fine-tuning differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from lamda.config.schema import Config
from lamda.data.documents import Form
from lamda.data.tokenizer import Tokenizer
from lamda.distributed import World

if TYPE_CHECKING:
    from lamda.engines.deepspeed.engine import Engine
    from lamda.engines.protocol import Scorer
    from lamda.training.trainer import Run

FULL = "eval/full/"
"""What begins the names of the last step's figures of all the held-out text; others `eval/...` are of some rows."""

Mark = Callable[[], None]
"""Tells the watchdog that something goes on."""

Shows = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""(what is done, how many there are) -> what is told of so many more."""


class Scores(Protocol):
    """What an evaluation found."""

    def metrics(self) -> dict[str, float]:
        """Its figures as they stand in metrics.jsonl, `eval/...`."""
        ...


class Evaluation(Protocol):
    """Held-out data of a run."""

    def rows(self, limit: int | None) -> Iterable[object]:
        """As many things as `score` will tell `scored` of, over all ranks."""
        ...

    def score(self, model: Scorer, **how: Any) -> Scores:
        """Score the model; every rank calls it. `how`: as the keywords of `lamda.training.evaluation.evaluate`."""
        ...


class Task(Protocol):
    """What is handed to `lamda.training.setup.train`."""

    def form(self, config: Config) -> Form:
        """What the records of the corpus are."""
        ...

    def held_out(
        self, config: Config, tokenizer: Tokenizer, *, on_wait: Callable[[], object] = lambda: None
    ) -> Evaluation | None:
        """What the run is evaluated on, if anything. on_wait: called while a server is waited for."""
        ...

    def told(self, run: Run) -> Iterator[str]:
        """The last evaluation as lines for a person."""
        ...

    def sample(self, run: Run, tokenizer: Tokenizer) -> str:
        """Something that the trained model wrote; every rank calls it."""
        ...


class TaskError(Exception):
    """A task of `eval.tasks` failed, with all ranks still in step: the run can go on without its figures."""


class Benchmarks(Protocol):
    """The tasks of `eval.tasks`, loaded."""

    def score(self, engine: Engine, tokenizer: Tokenizer, *, mark: Mark, shows: Shows) -> dict[str, float]:
        """On rank 0 their figures as they stand in metrics.jsonl, `eval/<task>/<metric>`; every rank calls it.

        Raises TaskError on rank 0.
        """
        ...


OpenBenchmarks = Callable[[Config, World], Benchmarks | None]
"""Loads the tasks of `eval.tasks`, if there are any; every rank calls it, at the start. Raises UserError."""
