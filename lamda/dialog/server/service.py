"""The server's work for a request, apart from HTTP: completions, and replies of the speaker."""

from __future__ import annotations

import secrets
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from lamda.data.tokenizer import Tokenizer
from lamda.dialog.encoding import Encoding
from lamda.dialog.server.admission import Slot
from lamda.dialog.server.limits import Limits
from lamda.dialog.server.progress import OnProgress, ReplyProgress, StrippedText
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, RequestError
from lamda.dialog.server.scheduler import Scheduler
from lamda.dialog.speaker import Reply, ReplyOptions, Speaker
from lamda.dialog.tools.toolset import Toolset
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, Pieces, Run, TextStream, TokenScore, token_scores_pieces
from lamda.inference.prefix_cache import PrefixCache
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

_JUDGED = 9
"""Rows to score a research step's response: itself, and four attributes with two ratings each."""


Reason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Choice:
    """A finished choice. tokens: generated for its text, 0 for a refusal. scores: of these, if they were requested."""

    text: str
    reason: Reason
    tokens: int
    scores: Sequence[TokenScore] | None = None


class Usage(NamedTuple):
    """Tokens of a request: of its context or prompts, of these from the cache, and of its choices."""

    prompt: int
    cached: int
    completion: int
    turns_left_out: int | None = None

    def to_record(self) -> dict[str, Any]:
        """As OpenAI's, and how many of a conversation's oldest turns the model did not read."""
        record = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        return record if self.turns_left_out is None else record | {"turns_left_out": self.turns_left_out}


@dataclass(frozen=True)
class ChatResult:
    """A reply; reason, tokens and scores are of its `Choice`.

    is_streamed: whether `on_text` has received the text. others: further choices, the next-best candidates.
    """

    reply: Reply
    reason: Reason
    tokens: int
    is_streamed: bool = False
    scores: Sequence[TokenScore] | None = None
    others: tuple[Choice, ...] = ()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """The reply and the others."""
        return (Choice(self.reply.text, self.reason, self.tokens, self.scores), *self.others)

    @property
    def usage(self) -> Usage:
        """What the model has read and written."""
        context = self.reply.context
        tokens = sum(choice.tokens for choice in self.choices)
        return Usage(len(context.ids), self.reply.cached_tokens, tokens, context.turns_left_out)


class _Endings:
    """How each generated text of a reply ended: whether by a stop, its ids, and the prefix that they continue."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of: dict[str, tuple[bool, list[int], Prefix]] = {}

    def add(self, prefix: Prefix, found: Candidates) -> None:
        """Of equal texts, the one that stopped counts, then the longest."""
        for ids, stopped in zip(found.ids, found.stopped, strict=True):
            text = self._tokenizer.decode(ids).strip()
            if text not in self.of or (stopped, len(ids)) > (self.of[text][0], len(self.of[text][1])):
                self.of[text] = (stopped, ids, prefix)


class Service:
    """One model behind a scheduler. Its methods block and may be called from many threads.

    name: what clients call the model. scheduler: runs it, and alone uses the cache of prompts. token_bytes: of the
    keys and values of one token.
    summary: how it answers unless a request says otherwise, as JSON.
    """

    def __init__(
        self,
        model: LaMDA,
        tokenizer: Tokenizer,
        *,
        name: str,
        sequence_length: int,
        is_tuned: bool,
        toolset: Toolset | None = None,
        options: ReplyOptions | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.scheduler = Scheduler(model)
        config = model.config
        self.token_bytes = 2 * config.n_layers * config.n_heads * config.d_head * model.final_norm.scale.element_size()
        self._model, self.tokenizer = model, tokenizer
        self._cache = PrefixCache(model, capacity=self.limits.cached_tokens)
        self._options, self._has_tools = options or ReplyOptions(), toolset is not None
        self._sequence_length, self._is_tuned = sequence_length, is_tuned
        self.summary = {
            "is_tuned": is_tuned,
            "candidates": self._options.candidates,
            "max_candidates": self.limits.candidates,
            "threshold": self._options.threshold,
            "tools": [tool.name for tool in toolset.tools] if toolset else [],
        }
        self._token_length = max(len(tokenizer.utf8(id)) for id in range(tokenizer.vocab_size))
        self._stop_ids = Encoding(tokenizer).stop_ids
        self._speaker = partial(
            Speaker, model, tokenizer, sequence_length=sequence_length, is_tuned=is_tuned, toolset=toolset
        )

    def complete(
        self, request: CompletionRequest, *, ticket: Slot, on_text: Callable[[int, str], None] | None = None
    ) -> tuple[list[Choice], Usage]:
        """The choices and their usage; calls `on_text(choice, text)` for each new text."""
        name = "prompt, times n," if len(request.prompt) > 1 else "n"
        self._check_count(name, request.n * len(request.prompt), param="n")
        prompts = [self._ids(prompt) for prompt in request.prompt]
        sampling = replace(self._sampling(request), stop_ids=self._stop_ids)
        rows = request.n + (request.logprobs is not None)
        ticket.reserve(max(map(len, prompts)) + rows * sampling.max_new_tokens)
        choices, cached = list[Choice](), 0
        for ids in prompts:
            prefix = self._run(ticket)(self._prefill(ticket)(ids), tokens=len(ids))
            cached += prefix.cached
            texts = [TextStream(self.tokenizer, request.stop) for _ in range(request.n)]
            emit = partial(_emit, on_text, len(choices))
            choices += self._choices(prefix, texts, sampling, ticket, emit, likeliest=request.logprobs)
        return choices, Usage(sum(map(len, prompts)), cached, sum(choice.tokens for choice in choices))

    def _choices(
        self,
        prefix: Prefix,
        texts: list[TextStream],
        sampling: Sampling,
        ticket: Slot,
        emit: Callable[[int, str], None],
        *,
        likeliest: int | None,
    ) -> list[Choice]:
        """The choices of one prompt."""

        def on_token(number: int, id: int) -> bool:
            emit(number, texts[number].add(id))
            return texts[number].stopped

        found = self.scheduler.sample(prefix, count=len(texts), sampling=sampling, ticket=ticket, on_token=on_token)
        for number, text in enumerate(texts):
            emit(number, text.end())
        choices = []
        for text, stopped, ids in zip(texts, found.stopped, found.ids, strict=True):
            reason: Reason = "stop" if stopped or text.stopped else "length"
            shown = self._shown(ids, text.text)
            scores = self._scores(prefix, shown, likeliest=likeliest, ticket=ticket)
            choices.append(Choice(text.text, reason, len(ids), scores))
        return choices

    def _shown(self, ids: list[int], text: str) -> list[int]:
        """The tokens that begin inside the text: others are of the string that stopped it, or of a cut character."""
        parts = [self.tokenizer.utf8(id) for id in ids]
        utf8, starts = b"".join(parts), [*accumulate(map(len, parts), initial=0)]

        def characters(number: int) -> int:
            """Up to the one that a token begins in."""
            return len(utf8[: starts[number] + 1].decode(errors="replace"))

        return ids[: bisect_right(range(len(ids)), len(text), key=characters)]

    def _scores(
        self, prefix: Prefix, ids: Sequence[int], *, likeliest: int | None, ticket: Slot
    ) -> Sequence[TokenScore] | None:
        """The scores of a choice's tokens, with so many others; None if there is no request for them."""
        if likeliest is None:
            return None
        pieces = token_scores_pieces(self._model, prefix, ids, likeliest=likeliest)
        return self.scheduler.run(pieces, tokens=len(ids), ticket=ticket)

    def _run(self, ticket: Slot) -> Run:
        return partial(self.scheduler.run, ticket=ticket)

    def _prefill(self, ticket: Slot) -> Callable[[Sequence[int]], Pieces[Prefix]]:
        """The cache as the client's key sees it."""
        return partial(self._cache.prefill_pieces, owner=ticket.key)

    def reply(
        self,
        request: ChatRequest,
        *,
        ticket: Slot,
        on_text: Callable[[str], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> ChatResult:
        """The speaker's reply to the conversation; `on_text` gets each new text of one that needs no rating."""
        options = self._reply_options(request)
        rows = options.candidates + (_JUDGED if self._has_tools else 0) + request.logprobs
        prefixes = 3 if self._has_tools else 1
        ticket.reserve(prefixes * self._sequence_length + rows * options.sampling.max_new_tokens)
        endings = _Endings(self.tokenizer)
        progress = ReplyProgress(on_progress, is_rated=self._is_tuned)

        def sample(prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None) -> Candidates:
            with progress.of(count, on_token) as watched:
                found = self.scheduler.sample(prefix, count=count, sampling=sampling, ticket=ticket, on_token=watched)
            endings.add(prefix, found)
            return found

        def choice(text: str) -> Choice:
            stopped, ids, prefix = endings.of[text]
            likeliest = request.top_logprobs if request.logprobs else None
            shown = self._shown(ids, self.tokenizer.decode(ids))
            scores = self._scores(prefix, shown, likeliest=likeliest, ticket=ticket)
            return Choice(text, "stop" if stopped else "length", len(ids), scores)

        speaker = self._speaker(sample=sample, prefill=self._prefill(ticket), run=self._run(ticket))
        most = self._sequence_length * self._token_length  # characters of a message that can fit
        messages = [message.to_message() for message in request.messages]
        kept = {"system": slice(most)}  # of others the end, as in a context
        messages = [replace(each, content=each.content[kept.get(each.role, slice(-most, None))]) for each in messages]
        text = StrippedText(on_text)
        reply = speaker.reply(messages, options, on_text=on_text and text.add)
        refusal = Choice(options.refusal, "content_filter", 0)
        first = refusal if reply.refused else choice(reply.text)
        others = (refusal if each.dropped else choice(each.text) for each in reply.candidates[1 : request.n])
        return ChatResult(
            reply, first.reason, first.tokens, is_streamed=text.sent > 0, scores=first.scores, others=tuple(others)
        )

    def _reply_options(self, request: ChatRequest) -> ReplyOptions:
        """What this request asks for, within the operator's bounds. Raises RequestError."""
        if request.messages[-1].role == "assistant":
            problem = "messages: the last one is the assistant's own; end with the user's"
            raise RequestError(400, problem, param="messages")
        self._check_count("n", request.n, param="n")
        count = request.candidates or max(self._options.candidates, request.n)
        self._check_count("candidates", count, param="candidates")
        if request.n > (most := 1 if self._has_tools else count):
            why = "with tools a chat has one answer" if self._has_tools else "the candidates"
            raise RequestError(400, f"n is {request.n}: at most {most}, {why}", param="n")
        return replace(
            self._options,
            candidates=count,
            threshold=self._threshold(request.threshold),
            sampling=self._sampling(request),
        )

    def _threshold(self, requested: float | None) -> float:
        """The operator's is an upper bound: a client may request a stricter filter, but not a weaker one."""
        most = self._options.threshold
        if requested is not None and requested > most:
            raise RequestError(400, f"threshold is {requested:g}: at most {most:g} on this server", param="threshold")
        return most if requested is None else requested

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        name, longest = "max_tokens", request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            name, longest = "max_completion_tokens", request.max_completion_tokens
        if longest is None:
            longest = min(self._options.sampling.max_new_tokens, self.limits.tokens)
        if longest > self.limits.tokens:
            raise RequestError(400, f"{name} is {longest}: at most {self.limits.tokens}", param=name)
        return Sampling(
            max_new_tokens=longest,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            seed=secrets.randbits(62) if request.seed is None else request.seed,
        )

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt after EOS; given ids may begin with it, but have no other control symbol."""
        end = self.tokenizer.end_of_document
        if isinstance(prompt, str):
            if len(prompt) > self.limits.tokens * self._token_length:  # do not encode what will be rejected
                raise _too_long(f"prompt has more than {self.limits.tokens} tokens")
            ids: Sequence[int] = self.tokenizer.encode(prompt)
        else:
            ids = prompt[1:] if prompt and prompt[0] == end else prompt
        if len(ids) >= self.limits.tokens:
            raise _too_long(f"prompt has {len(ids)} tokens: fewer than {self.limits.tokens} are allowed")
        if not isinstance(prompt, str):
            for id in ids:
                if not 0 <= id < self.tokenizer.vocab_size or id in self._stop_ids:
                    raise RequestError(400, f"prompt: {str(id)[:20]} is not the id of a text token", param="prompt")
        return [end, *ids]

    def _check_count(self, name: str, count: int, *, param: str) -> None:
        if count > self.limits.candidates:
            raise RequestError(400, f"{name} is {count}: at most {self.limits.candidates}", param=param)


def _too_long(problem: str) -> RequestError:
    return RequestError(400, problem, param="prompt", code="context_length_exceeded")


def _emit(on_text: Callable[[int, str], None] | None, first: int, number: int, text: str) -> None:
    if text and on_text is not None:
        on_text(first + number, text)
