"""A model that answers: the candidates, their filter and ranking, the research loop, and the reply with its reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from lamda.config.errors import UserError
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import Message
from lamda.dialog.encoding import Encoding
from lamda.dialog.ranking import Scored, judge, rank_by_attributes, rank_by_likelihood, why_dropped
from lamda.dialog.research import MAX_QUERIES, Step, research, sources
from lamda.dialog.tools.toolset import Toolset
from lamda.inference import generation
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, Run, TextStream, prefill_pieces, whole
from lamda.inference.loading import LoadedModel
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

REFUSAL = "I have no safe answer to that."


@dataclass(frozen=True)
class Manner:
    """How to answer. Raises UserError with everything that cannot be.

    candidates: how many are sampled. threshold: of P(unsafe), above which one is dropped (the paper names no
    value). sampling: of a candidate; the stop symbols are the speaker's. max_queries: of the research loop.
    refusal: what is said where every candidate was dropped.
    """

    candidates: int = 16
    threshold: float = 0.5
    sampling: Sampling = field(default_factory=Sampling)
    max_queries: int = MAX_QUERIES
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        wrong = (
            (self.candidates < 1, f"the number of candidates is {self.candidates}: give at least 1"),
            (not 0 <= self.threshold <= 1, f"the threshold is {self.threshold}: give a probability, 0 to 1"),
            (self.max_queries < 0, f"the number of queries is {self.max_queries}: give 0 or more"),
            (not self.refusal.strip(), "the refusal is empty: give a text"),
        )
        problems = [message for is_wrong, message in wrong if is_wrong]
        if problems:
            raise UserError("\n".join(problems))


@dataclass(frozen=True)
class Reply:
    """What is said, and all that led to it.

    context_tokens: that the model read before the answer. left_out: messages that had no room among them. cut: whether
    the last message was too long by itself, so that its beginning had none either.
    candidates: of the base answer, the best first, the dropped ones last. steps: of the research loop.
    sources: of the results that the text rests on. refused: the text is the refusal, none of the candidates.
    """

    text: str
    candidates: tuple[Scored, ...]
    steps: tuple[Step, ...] = ()
    sources: tuple[str, ...] = ()
    refused: bool = False
    context_tokens: int = 0
    left_out: int = 0
    cut: bool = False

    def to_record(self) -> dict[str, Any]:
        """Everything but the text, as JSON."""
        return {
            "candidates": [candidate.to_record() for candidate in self.candidates],
            "steps": [step.to_record() for step in self.steps],
            "sources": list(self.sources),
            "refused": self.refused,
            "context": {
                "tokens": self.context_tokens,
                "messages_left_out": self.left_out,
                "last_message_cut": self.cut,
            },
        }


class Sample(Protocol):
    """How candidates are sampled; a server gathers those of several requests."""

    def __call__(
        self, prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None
    ) -> Candidates:
        """`count` finished continuations of the prefix; `on_token` is told each token as it comes."""
        ...


class Speaker:
    """Answers conversations with one model. Nothing of a conversation stays in it.

    Attributes:
        encoding: of the conversations.
        manner: how it answers where a call does not say otherwise.
        is_tuned: whether the model was taught to judge and to research, as examples that are packed whole teach
            it; else it continues lines of text, and its candidates are ranked by their likelihood.
    """

    def __init__(
        self,
        model: LaMDA,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        is_tuned: bool = True,
        toolset: Toolset | None = None,
        manner: Manner | None = None,
        sample: Sample | None = None,
        run: Run = whole,
    ) -> None:
        """Tools make it research; `sample` is that of `lamda.inference.generation` where none is given.

        run: how everything else is run on the model.
        """
        self.encoding = Encoding(tokenizer)
        self.manner = manner or Manner()
        self.is_tuned = is_tuned
        self._model = model
        self._tokenizer = tokenizer
        self._sequence_length = sequence_length
        self._toolset = toolset
        self._sample = sample or partial(generation.sample, model)
        self._run = run
        if toolset is not None and not is_tuned:
            raise UserError("the tools are for a model that was fine-tuned to use them; leave them out")

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        *,
        toolset: Toolset | None = None,
        manner: Manner | None = None,
        sample: Sample | None = None,
    ) -> Speaker:
        """The speaker of a loaded run. Raises UserError where tools are given to one that was not fine-tuned."""
        return cls(
            loaded.model,
            loaded.tokenizer,
            sequence_length=loaded.config.data.sequence_length,
            is_tuned=loaded.config.data.packing == "whole",
            toolset=toolset,
            manner=manner,
            sample=sample,
        )

    def streams(self, manner: Manner | None = None) -> bool:
        """Whether a reply is known while it is written: one candidate, which nothing judges afterwards."""
        return not self.is_tuned and (manner or self.manner).candidates == 1

    def reply(
        self, messages: Sequence[Message], manner: Manner | None = None, *, on_text: Callable[[str], None] | None = None
    ) -> Reply:
        """Answer the last message; where it `streams`, `on_text` gets the text as it comes.

        Raises UserError where there is no message.
        """
        if not messages:
            raise UserError("there is no message to answer")
        manner = manner or self.manner
        ids, left_out, is_cut = self._context(messages, manner)
        prefix = self._prefill(ids)
        sampling = replace(manner.sampling, stop_ids=self._stop_ids)
        stream = _Stream(self._tokenizer, on_text) if on_text is not None and self.streams(manner) else None
        candidates = self._sample(prefix, count=manner.candidates, sampling=sampling, on_token=stream)
        if stream is not None:
            stream.end()
        if not self.is_tuned:
            ranked = rank_by_likelihood(candidates, self.encoding)
        else:
            ranked = rank_by_attributes(candidates, self.encoding, threshold=manner.threshold, run=self._run)
        del candidates  # their keys and values: research takes room of its own
        read = {"context_tokens": len(ids), "left_out": left_out, "cut": is_cut}
        if ranked[0].dropped is not None:
            return Reply(manner.refusal, ranked, refused=True, **read)
        base = Reply(ranked[0].text, ranked, **read)
        return base if self._toolset is None else self._researched(base, messages, prefix, manner)

    def _researched(self, base: Reply, messages: Sequence[Message], prefix: Prefix, manner: Manner) -> Reply:
        """The base answer after the research loop. Where the loop's response fails the filter, the base stays."""
        ask = partial(self._next_step, messages=messages, base=base.text, manner=manner)
        *queries, last = research(ask, self._toolset, max_queries=manner.max_queries)
        ids = self.encoding.response(last.text)
        judgement = judge(self._model, prefix, ids, self.encoding, run=self._run) if ids else {}
        dropped = why_dropped(last.text, judgement, threshold=manner.threshold)
        steps = (*queries, replace(last, dropped=dropped))
        if dropped is not None:
            return replace(base, steps=steps)
        return replace(base, text=last.text, steps=steps, sources=sources(queries))

    def _next_step(
        self, steps: Sequence[Step], *, may_ask: bool, messages: Sequence[Message], base: str, manner: Manner
    ) -> tuple[Literal["TS", "user"], str]:
        """The likelier of TS and USER, then the likeliest text: a step is not sampled."""
        encoding = self.encoding
        pairs = [(step.text, step.snippet) for step in steps]
        ids = encoding.research_context(messages, base, pairs, max_tokens=self._room(manner) - 1)
        asks = False
        if may_ask:
            logits_V = self._prefill(ids).logits_V
            asks = bool(logits_V[encoding.ts] > logits_V[encoding.user])
        prefix = self._prefill([*ids, encoding.ts if asks else encoding.user])
        sampling = Sampling(max_new_tokens=manner.sampling.max_new_tokens, temperature=0.0, stop_ids=encoding.stop_ids)
        candidates = self._sample(prefix, count=1, sampling=sampling)
        return ("TS" if asks else "user"), encoding.decode(candidates.ids[0]).strip()

    def _prefill(self, ids: Sequence[int]) -> Prefix:
        return self._run(prefill_pieces(self._model, ids), tokens=len(ids))

    def _context(self, messages: Sequence[Message], manner: Manner) -> tuple[list[int], int, bool]:
        """What the model reads, how many messages had no room, and whether the last one was cut."""
        encoding, room = self.encoding, self._room(manner)
        if self.is_tuned:
            ids = encoding.context(messages, max_tokens=room)
            places = [place for place, id in enumerate(ids) if id in encoding.stop_ids][
                1:
            ]  # of each message, and RESPONSE
            kept = len(places) - 1
            is_cut = places[-1] - places[-2] - 1 < len(encoding.text(messages[-1].content))
            return ids, len(messages) - kept, is_cut
        first = encoding.text(_lines(m for m in messages if m.role == "system"))[: room // 2]
        said = encoding.text(_lines(m for m in messages if m.role != "system"))
        kept_ids = said[max(len(said) - (room - 1 - len(first)), 0) :]
        lines = encoding.decode(kept_ids).count("\n") + sum(m.role == "system" for m in messages)
        is_cut = len(kept_ids) < len(encoding.text(_lines(messages[-1:])))
        return [encoding.end, *first, *kept_ids], len(messages) - max(lines, 1), is_cut

    def _room(self, manner: Manner) -> int:
        """Tokens of a context, so that the response still fits the length of the training rows."""
        return max(self._sequence_length - manner.sampling.max_new_tokens, self._sequence_length // 2, 8)

    @property
    def _stop_ids(self) -> frozenset[int]:
        """Every control symbol; of a model that continues lines of text also the end of one."""
        return self.encoding.stop_ids if self.is_tuned else self.encoding.stop_ids | {*self.encoding.text("\n")}


def _lines(messages: Iterable[Message]) -> str:
    """A line of text a message."""
    return "".join(" ".join(message.content.split()) + "\n" for message in messages)


class _Stream:
    """Passes the only candidate's text on as it comes."""

    def __init__(self, tokenizer: Tokenizer, on_text: Callable[[str], None]) -> None:
        self._text = TextStream(tokenizer)
        self._on_text = on_text

    def __call__(self, _: int, id: int) -> None:
        self._on_text(self._text.add(id))

    def end(self) -> None:
        self._on_text(self._text.end())
