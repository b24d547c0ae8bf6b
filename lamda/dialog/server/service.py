"""The server's work for a request, apart from HTTP: completions, and replies of the speaker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

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
from lamda.inference.generation import Candidates, OnToken, TextStream, prefill_pieces
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

_JUDGED = 9
"""Rows to score a research step's response: itself, and four attributes with two ratings each."""


@dataclass(frozen=True)
class Choice:
    """A finished choice of a completion."""

    text: str
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class ChatResult:
    """A reply, its finish reason, and the number of tokens generated for its text: 0 for a refusal.

    is_streamed: whether `on_text` has received the text.
    """

    reply: Reply
    reason: Literal["stop", "length", "content_filter"]
    tokens: int
    is_streamed: bool = False


class Service:
    """One model behind a scheduler. Its methods block and may be called from many threads.

    name: what clients call the model. scheduler: runs it. token_bytes: of the keys and values of one token.
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
        self._model, self._tokenizer = model, tokenizer
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
    ) -> tuple[list[Choice], int]:
        """The choices and the number of prompt tokens; calls `on_text(choice, text)` for each new text."""
        name = "prompt, times n," if len(request.prompt) > 1 else "n"
        self._check_count(name, request.n * len(request.prompt), param="n")
        prompts = [self._ids(prompt) for prompt in request.prompt]
        sampling = replace(self._sampling(request, request.max_tokens), stop_ids=self._stop_ids)
        ticket.reserve(max(map(len, prompts)) + request.n * sampling.max_new_tokens)
        choices: list[Choice] = []
        for ids in prompts:
            texts = [TextStream(self._tokenizer, request.stop) for _ in range(request.n)]
            choices += self._choices(ids, texts, sampling, ticket, partial(_emit, on_text, len(choices)))
        return choices, sum(map(len, prompts))

    def _choices(
        self,
        ids: list[int],
        texts: list[TextStream],
        sampling: Sampling,
        ticket: Slot,
        emit: Callable[[int, str], None],
    ) -> list[Choice]:
        """The choices of one prompt."""

        def on_token(number: int, id: int) -> bool:
            emit(number, texts[number].add(id))
            return texts[number].stopped

        found = self.scheduler.sample(
            self.scheduler.run(prefill_pieces(self._model, ids), tokens=len(ids), ticket=ticket),
            count=len(texts),
            sampling=sampling,
            ticket=ticket,
            on_token=on_token,
        )
        for number, text in enumerate(texts):
            emit(number, text.end())
        ends = zip(texts, found.stopped, found.ids, strict=True)
        return [Choice(t.text, "stop" if s or t.stopped else "length", len(ids)) for t, s, ids in ends]

    def reply(
        self,
        request: ChatRequest,
        *,
        ticket: Slot,
        on_text: Callable[[str], None] | None = None,
        on_progress: OnProgress | None = None,
    ) -> ChatResult:
        """The speaker's reply to the conversation; `on_text` gets each new text of one that needs no rating."""
        if request.messages[-1].role == "assistant":
            problem = "messages: the last one is the assistant's own; end with the user's"
            raise RequestError(400, problem, param="messages")
        count = request.candidates or self._options.candidates
        self._check_count("candidates", count, param="candidates")
        options = replace(
            self._options,
            candidates=count,
            threshold=self._threshold(request.threshold),
            sampling=self._sampling(request, request.max_completion_tokens or request.max_tokens),
        )
        rows = count + (_JUDGED if self._has_tools else 0)
        prefixes = 3 if self._has_tools else 1
        ticket.reserve(prefixes * self._sequence_length + rows * options.sampling.max_new_tokens)
        ended: dict[str, tuple[bool, int]] = {}
        progress = ReplyProgress(on_progress, is_rated=self._is_tuned)

        def sample(prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None) -> Candidates:
            with progress.of(count, on_token) as watched:
                found = self.scheduler.sample(prefix, count=count, sampling=sampling, ticket=ticket, on_token=watched)
            for ids, stopped in zip(found.ids, found.stopped, strict=True):
                text = self._tokenizer.decode(ids).strip()
                ended[text] = max((stopped, len(ids)), ended.get(text, (False, 0)))
            return found

        speaker = self._speaker(sample=sample, run=partial(self.scheduler.run, ticket=ticket))
        most = self._sequence_length * self._token_length  # characters of a message that can fit
        messages = [message.to_message() for message in request.messages]
        messages = [replace(each, content=each.content[-most:]) for each in messages]
        text = StrippedText(on_text)
        reply = speaker.reply(messages, options, on_text=on_text and text.add)
        if reply.refused:
            return ChatResult(reply, "content_filter", 0)
        stopped, tokens = ended[reply.text]
        return ChatResult(reply, "stop" if stopped else "length", tokens, is_streamed=text.sent > 0)

    def _threshold(self, requested: float | None) -> float:
        """The operator's is an upper bound: a client may request a stricter filter, but not a weaker one."""
        most = self._options.threshold
        if requested is not None and requested > most:
            raise RequestError(400, f"threshold is {requested:g}: at most {most:g} on this server", param="threshold")
        return most if requested is None else requested

    def _sampling(self, request: ChatRequest | CompletionRequest, max_tokens: int | None) -> Sampling:
        longest = min(self._options.sampling.max_new_tokens, self.limits.tokens) if max_tokens is None else max_tokens
        if longest > self.limits.tokens:
            raise RequestError(400, f"max_tokens is {longest}: at most {self.limits.tokens}", param="max_tokens")
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
        end = self._tokenizer.end_of_document
        if isinstance(prompt, str):
            if len(prompt) > self.limits.tokens * self._token_length:  # do not encode what will be rejected
                raise RequestError(400, f"prompt has more than {self.limits.tokens} tokens", param="prompt")
            ids: Sequence[int] = self._tokenizer.encode(prompt)
        else:
            ids = prompt[1:] if prompt and prompt[0] == end else prompt
        if len(ids) >= self.limits.tokens:
            problem = f"prompt has {len(ids)} tokens: fewer than {self.limits.tokens} are allowed"
            raise RequestError(400, problem, param="prompt")
        if not isinstance(prompt, str):
            for id in ids:
                if not 0 <= id < self._tokenizer.vocab_size or id in self._stop_ids:
                    raise RequestError(400, f"prompt: {str(id)[:20]} is not the id of a text token", param="prompt")
        return [end, *ids]

    def _check_count(self, name: str, count: int, *, param: str) -> None:
        if count > self.limits.candidates:
            raise RequestError(400, f"{name} is {count}: at most {self.limits.candidates}", param=param)


def _emit(on_text: Callable[[int, str], None] | None, first: int, number: int, text: str) -> None:
    if text and on_text is not None:
        on_text(first + number, text)
