"""Fine-tuning: dialogues, their held-out perplexity and ratings, and a response."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lamda.best_effort import BestEffort
from lamda.config.schema import Config
from lamda.data.card import Source
from lamda.data.documents import Form
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.calibration import CALIBRATION, Calibration
from lamda.dialog.conversation import Message
from lamda.dialog.encoding import Encoding
from lamda.dialog.evaluation import DialogScores, HeldOutDialogues
from lamda.dialog.examples import Conversations, Response, examples_in
from lamda.dialog.report import table
from lamda.distributed import on_main
from lamda.engines.protocol import Engine
from lamda.training.task import Scores, continuation


class Finetuning:
    """See `lamda.training.task.Task`."""

    def __init__(self) -> None:
        self._evaluation: HeldOutDialogues | None = None
        self._calibration: Calibration | None = None

    def form(self, config: Config) -> Form:
        """Conversations."""
        return Conversations.of(config)

    def open_evaluation(
        self,
        config: Config,
        tokenizer: Tokenizer,
        sources: Sequence[Source],
        *,
        on_wait: Callable[[], object] = lambda: None,
    ) -> HeldOutDialogues | None:
        """The validation dialogues, if there are any."""
        if sources:
            form, length = Conversations.of(config), config.data.sequence_length
            self._evaluation = HeldOutDialogues(HeldOut(tuple(sources), tokenizer, length, form, on_wait=on_wait))
        return self._evaluation

    def summary(self, scores: Scores) -> Iterator[str]:
        """Perplexity of responses, and AUC, accuracy and calibration of ratings."""
        assert isinstance(scores, DialogScores)
        yield from table(scores.report(self._calibration))

    def attachments(self, config: Config, scores: Scores) -> dict[str, str]:
        """The calibration, if any held-out response is rated, and the model has not diverged."""
        assert isinstance(scores, DialogScores)
        ratings = {name: each for name, each in scores.ratings.items() if np.isfinite(each.probabilities).all()}
        if not ratings:
            return {}
        self._calibration = Calibration.of(ratings, false_refusals=config.dialog.false_refusals)
        return {CALIBRATION: self._calibration.model_dump_json(indent=1)}

    def sample(self, engine: Engine, tokenizer: Tokenizer) -> str:
        """The model's response to the first held-out message that has one, or to nothing."""
        encoding = Encoding(tokenizer)

        def prompt() -> tuple[str, list[int]]:
            context = self._context()
            said = "".join(f"{message.role}: {message.content}\n" for message in context)
            return said, encoding.context(context, max_tokens=engine.config.data.sequence_length)

        said, ids = on_main(engine.world, prompt)
        return f"{said}assistant⟫ {tokenizer.decode(continuation(engine, ids, stop_ids=tuple(encoding.stop_ids)))}\n"

    def _context(self) -> tuple[Message, ...]:
        with BestEffort("no held-out message to answer", then="nothing is answered", errors=Exception):
            for document in self._evaluation.text.documents() if self._evaluation is not None else ():
                for each in examples_in(document)[0]:
                    if isinstance(each, Response) and each.context:
                        return each.context
        return ()
