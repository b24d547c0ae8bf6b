"""Fine-tuning: dialogues, their held-out perplexity and ratings, and a response."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import orjson

from lamda.best_effort import BestEffort
from lamda.config.schema import Config
from lamda.data.documents import Form
from lamda.data.held_out import HeldOut
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import Message, parse_conversation
from lamda.dialog.encoding import Encoding
from lamda.dialog.evaluation import HeldOutDialogues, table
from lamda.dialog.examples import Conversations, Response, examples_of
from lamda.distributed import on_main
from lamda.training.inputs import validation
from lamda.training.pretraining import continuation
from lamda.training.trainer import Run


class Finetuning:
    """See `lamda.training.task.Task`."""

    def form(self, config: Config) -> Form:
        """Conversations."""
        return Conversations.of(config)

    def held_out(
        self, config: Config, tokenizer: Tokenizer, *, on_wait: Callable[[], object] = lambda: None
    ) -> HeldOutDialogues | None:
        """The validation dialogues, if there are any."""
        sources = validation(config)
        if not sources:
            return None
        return HeldOutDialogues(
            HeldOut(sources, tokenizer, config.data.sequence_length, Conversations.of(config), on_wait=on_wait)
        )

    def told(self, run: Run) -> Iterator[str]:
        """Perplexity, and how well ratings are told."""
        yield from table(run.scores.report())

    def sample(self, run: Run, tokenizer: Tokenizer) -> str:
        """What the model answers to the first held-out message that has an answer, or to nothing."""
        encoding = Encoding(tokenizer)

        def prompt() -> tuple[str, list[int]]:
            context = _context(run)
            said = "".join(f"{message.role}: {message.content}\n" for message in context)
            return said, encoding.context(context, max_tokens=run.config.data.sequence_length)

        said, ids = on_main(run.world, prompt)
        return f"{said}assistant⟫ {tokenizer.decode(continuation(run, ids, stop_ids=tuple(encoding.stop_ids)))}\n"


def _context(run: Run) -> tuple[Message, ...]:
    with BestEffort("no held-out message to answer", then="nothing is answered", errors=Exception):
        for document in run.held_out.text.documents() if run.held_out is not None else ():
            generative, _ = examples_of(parse_conversation(orjson.loads(document.text)))
            for each in generative:
                if isinstance(each, Response) and each.context:
                    return each.context
    return ()
