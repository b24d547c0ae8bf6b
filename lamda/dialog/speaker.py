"""A model's replies: candidates, filter and ranking, the research loop, and the reply with its reasons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from lamda.config.errors import UserError
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.calibration import Calibration
from lamda.dialog.conversation import Message, is_text
from lamda.dialog.encoding import Context, Encoding
from lamda.dialog.ranking import Scored, drop_reason, judge, rank_by_attributes, rank_by_likelihood
from lamda.dialog.research import MAX_QUERIES, ToolCall, research, sources
from lamda.dialog.tools.toolset import Toolset
from lamda.inference import generation
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, Pieces, Run, TextStream, whole
from lamda.inference.loading import LoadedModel
from lamda.inference.prefix_cache import PrefixCache
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

REFUSAL = "I have no safe answer to that."


@dataclass(frozen=True)
class ReplyOptions:
    """Options of a reply. Raises UserError with every invalid one.

    candidates: number of samples. threshold: candidates with P(unsafe) above it are dropped (the paper names no
    value). calibration: of the probabilities. sampling: of a candidate; the stop symbols are the speaker's.
    max_queries: of the research loop.
    refusal: the reply if every candidate is dropped.
    """

    candidates: int = 16
    threshold: float = 0.5
    calibration: Calibration | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_queries: int = MAX_QUERIES
    refusal: str = REFUSAL

    def __post_init__(self) -> None:
        checks = (
            (self.candidates < 1, f"the number of candidates is {self.candidates}: give at least 1"),
            (not 0 <= self.threshold <= 1, f"the threshold is {self.threshold}: give a probability, 0 to 1"),
            (self.max_queries < 0, f"the number of queries is {self.max_queries}: give 0 or more"),
            (not self.refusal.strip(), "the refusal is empty: give a text"),
            (not is_text(self.refusal), "the refusal is not valid UTF-8: give text in UTF-8"),
        )
        problems = [message for is_wrong, message in checks if is_wrong]
        if problems:
            raise UserError("\n".join(problems))


@dataclass(frozen=True)
class Reply:
    """A reply and how it was chosen.

    candidates: of the base answer, best first, dropped ones last. steps: of the research loop.
    sources: of the tool results behind the text. refused: whether the text is the refusal.
    context: what the model read before the answer. cached_tokens: of it, computed for an earlier reply.
    """

    text: str
    candidates: tuple[Scored, ...]
    steps: tuple[ToolCall, ...] = ()
    sources: tuple[str, ...] = ()
    refused: bool = False
    context: Context = field(default_factory=lambda: Context([]))
    cached_tokens: int = 0

    def to_record(self) -> dict[str, Any]:
        """All but the text, as JSON."""
        return {
            "candidates": [candidate.to_record() for candidate in self.candidates],
            "steps": [asdict(step) for step in self.steps],
            "sources": list(self.sources),
            "refused": self.refused,
            "context": {
                "tokens": len(self.context.ids),
                "cached_tokens": self.cached_tokens,
                "turns_left_out": self.context.turns_left_out,
                "messages_left_out": self.context.messages_left_out,
                "system_cut": self.context.system_cut,
                "last_message_cut": self.context.last_message_cut,
            },
        }


class Sample(Protocol):
    """Samples candidates; a server batches those of several requests."""

    def __call__(
        self, prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None
    ) -> Candidates:
        """`count` finished continuations of the prefix; `on_token` is called with each token."""
        ...


class Speaker:
    """Replies to conversations with one model. Between calls it keeps only computed prompts.

    options: defaults for `reply`. is_tuned: whether the model was fine-tuned on dialogues to score and to research
    (data.packing whole); otherwise it continues lines of text, and candidates are ranked by likelihood.
    """

    def __init__(
        self,
        model: LaMDA,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        is_tuned: bool = True,
        toolset: Toolset | None = None,
        options: ReplyOptions | None = None,
        sample: Sample | None = None,
        prefill: Callable[[Sequence[int]], Pieces[Prefix]] | None = None,
        run: Run = whole,
    ) -> None:
        """toolset: enables the research loop. sample: default `lamda.inference.generation.sample`.

        prefill: computes prompts; default: with a cache of its own, for one conversation. run: runs all other work on
        the model. Raises UserError for tools with a model that is not fine-tuned.
        """
        if toolset is not None and not is_tuned:
            raise UserError("tools need a model that was fine-tuned to use them; leave them out")
        self.encoding, self.options, self.is_tuned = Encoding(tokenizer), options or ReplyOptions(), is_tuned
        self._model, self._tokenizer, self._toolset = model, tokenizer, toolset
        self._sequence_length = sequence_length
        self._sample, self._run = sample or partial(generation.sample, model), run
        self._prompt = prefill or PrefixCache(model, capacity=2 * sequence_length).prefill_pieces

    @classmethod
    def of(cls, loaded: LoadedModel, *, toolset: Toolset | None = None, options: ReplyOptions | None = None) -> Speaker:
        """The speaker of a loaded run. Raises UserError for tools with a model that is not fine-tuned."""
        return cls(
            loaded.model,
            loaded.tokenizer,
            sequence_length=loaded.config.data.sequence_length,
            is_tuned=loaded.config.data.packing == "whole",
            toolset=toolset,
            options=options,
        )

    def streams(self, options: ReplyOptions | None = None) -> bool:
        """Whether a reply can be streamed: there is one candidate, and nothing may replace it."""
        options = options or self.options
        is_unfiltered = not self.is_tuned or (options.threshold >= 1 and self._toolset is None)
        return is_unfiltered and options.candidates == 1

    def reply(
        self,
        messages: Sequence[Message],
        options: ReplyOptions | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer the last message; `on_text` gets each new text if it `streams`. Raises UserError without a message."""
        if not messages:
            raise UserError("there is no message to answer")
        options = options or self.options
        room = self._room(options)
        context = self.encoding.fitted_context(messages, max_tokens=room, as_lines=not self.is_tuned)
        prefix = self._prefill(context.ids)
        newline = () if self.is_tuned else self.encoding.text("\n")  # ends the line that another model continues
        sampling = replace(options.sampling, stop_ids=self.encoding.stop_ids.union(newline))
        if on_text is None or not self.streams(options):
            candidates = self._sample(prefix, count=options.candidates, sampling=sampling)
        else:
            stream, emit = TextStream(self._tokenizer), on_text
            candidates = self._sample(prefix, count=1, sampling=sampling, on_token=lambda _, id: emit(stream.add(id)))
            emit(stream.end())
        if self.is_tuned:
            ranked = rank_by_attributes(
                candidates, self.encoding, threshold=options.threshold, calibration=options.calibration, run=self._run
            )
        else:
            ranked = rank_by_likelihood(candidates, self.encoding)
        del candidates  # frees keys and values, for research
        base = Reply(ranked[0].text, ranked, context=context, cached_tokens=prefix.cached)
        if ranked[0].dropped is not None:
            return replace(base, text=options.refusal, refused=True)
        return base if self._toolset is None else self._researched(base, self._toolset, messages, prefix, options)

    def _researched(
        self, base: Reply, toolset: Toolset, messages: Sequence[Message], prefix: Prefix, options: ReplyOptions
    ) -> Reply:
        """The reply after the research loop. If the loop's response fails the filter, the base answer remains."""
        ask = partial(self._next_step, messages=messages, base=base.text, options=options)
        *queries, last = research(ask, toolset, max_queries=options.max_queries)
        ids = self.encoding.text(last.text)
        rate = partial(judge, calibration=options.calibration, run=self._run)
        judgment = rate(self._model, prefix, ids, self.encoding) if ids else {}
        dropped = drop_reason(last.text, judgment, threshold=options.threshold)
        steps = (*queries, replace(last, dropped=dropped))
        if dropped is not None:
            return replace(base, steps=steps)
        return replace(base, text=last.text, steps=steps, sources=sources(queries))

    def _next_step(
        self, steps: Sequence[ToolCall], *, may_ask: bool, messages: Sequence[Message], base: str, options: ReplyOptions
    ) -> tuple[Literal["TS", "user"], str]:
        """The more probable of TS and USER, then greedy text: a step is not sampled."""
        encoding = self.encoding
        pairs = [(step.text, step.snippet) for step in steps]
        ids = encoding.research_context(messages, base, pairs, max_tokens=self._room(options) - 1)
        asks = False
        if may_ask:
            logits_V = self._prefill(ids).logits_V
            asks = bool(logits_V[encoding.ts] > logits_V[encoding.user])
        prefix = self._prefill([*ids, encoding.ts if asks else encoding.user])
        sampling = Sampling(max_new_tokens=options.sampling.max_new_tokens, temperature=0.0, stop_ids=encoding.stop_ids)
        candidates = self._sample(prefix, count=1, sampling=sampling)
        return ("TS" if asks else "user"), encoding.decode(candidates.ids[0]).strip()

    def _prefill(self, ids: Sequence[int]) -> Prefix:
        return self._run(self._prompt(ids), tokens=len(ids))

    def _room(self, options: ReplyOptions) -> int:
        """Maximum tokens of a context, so that context and response fit a training row."""
        return max(self._sequence_length - options.sampling.max_new_tokens, self._sequence_length // 2, 8)
