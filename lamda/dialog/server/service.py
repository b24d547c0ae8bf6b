"""What the server does for a request, apart from HTTP: completions, and replies of the speaker."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from lamda.data.tokenizer import Tokenizer
from lamda.dialog.encoding import Encoding
from lamda.dialog.server.choices import ChoiceText
from lamda.dialog.server.protocol import ChatRequest, CompletionRequest, Refused
from lamda.dialog.server.scheduler import Scheduler, Ticket
from lamda.dialog.speaker import Manner, Reply, Speaker
from lamda.dialog.tools.toolset import Toolset
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, prefill
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA


@dataclass(frozen=True)
class Limits:
    """What one client cannot exceed, and all together not either.

    tokens: of a prompt and of what is generated, each. candidates: of a request. seconds: a request, waiting included.
    requests: at the same time; one more is refused with 429. bytes: of a body.
    """

    tokens: int = 2048
    candidates: int = 64
    seconds: float = 120.0
    requests: int = 64
    bytes: int = 1_000_000


@dataclass(frozen=True)
class Choice:
    """A finished choice of a completion."""

    text: str
    reason: Literal["stop", "length"]
    tokens: int


class Service:
    """One model behind a scheduler. Its methods block and may be called from many threads.

    Attributes:
        name: what clients call the model.
        limits: see `Limits`.
        scheduler: the thread that generates.
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
        manner: Manner | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.limits = name, limits or Limits()
        self.scheduler = Scheduler(model)
        self._model, self._tokenizer = model, tokenizer
        self._manner = manner or Manner()
        self._stop_ids = Encoding(tokenizer).stop_ids
        self._speaker = partial(
            Speaker, model, tokenizer, sequence_length=sequence_length, is_tuned=is_tuned, toolset=toolset
        )

    def complete(
        self, asked: CompletionRequest, *, ticket: Ticket, on_text: Callable[[int, str], None] | None = None
    ) -> tuple[list[Choice], int]:
        """The choices and the number of the prompt's tokens; `on_text` gets (number, text) as it comes."""
        self._check_count("n", asked.n)
        ids = [self._tokenizer.end_of_document, *self._encode("prompt", asked.prompt)]
        sampling = replace(self._sampling(asked, asked.max_tokens), stop_ids=self._stop_ids)
        ticket.check()
        texts = [ChoiceText(self._tokenizer, asked.stop) for _ in range(asked.n)]

        def tell(number: int, text: str) -> None:
            if text and on_text is not None:
                on_text(number, text)

        def on_token(number: int, id: int) -> bool:
            tell(number, texts[number].add(id))
            return texts[number].stopped

        found = self.scheduler.sample(
            prefill(self._model, ids), count=asked.n, sampling=sampling, ticket=ticket, on_token=on_token
        )
        for number, text in enumerate(texts):
            tell(number, text.end())
        ends = zip(texts, found.stopped, found.ids, strict=True)
        return [Choice(t.text, "stop" if s or t.stopped else "length", len(own)) for t, s, own in ends], len(ids)

    def reply(self, asked: ChatRequest, *, ticket: Ticket) -> tuple[Reply, Literal["stop", "length", "content_filter"]]:
        """The speaker's reply to the conversation, and why it ends where it does."""
        if asked.messages[-1].role == "assistant":
            raise Refused(400, "messages: the last one is the assistant's own; end with the user's", param="messages")
        messages = [message.to_message() for message in asked.messages]
        for number, message in enumerate(messages):
            self._encode(f"messages.{number}.content", message.content)
        count = asked.candidates or self._manner.candidates
        self._check_count("candidates", count)
        manner = replace(
            self._manner,
            candidates=count,
            threshold=self._manner.threshold if asked.threshold is None else asked.threshold,
            sampling=self._sampling(asked, asked.max_completion_tokens or asked.max_tokens),
        )
        ticket.check()
        ended: dict[str, bool] = {}

        def sample(prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None) -> Candidates:
            found = self.scheduler.sample(prefix, count=count, sampling=sampling, ticket=ticket, on_token=on_token)
            for ids, stopped in zip(found.ids, found.stopped, strict=True):
                text = self._tokenizer.decode(ids).strip()
                ended[text] = stopped or ended.get(text, False)
            return found

        reply = self._speaker(sample=sample).reply(messages, manner)
        if reply.refused:
            return reply, "content_filter"
        return reply, "stop" if ended[reply.text] else "length"

    def count_tokens(self, *texts: str) -> int:
        """Tokens of the texts together."""
        return sum(len(self._tokenizer.encode(text)) for text in texts)

    def _sampling(self, asked: ChatRequest | CompletionRequest, max_tokens: int | None) -> Sampling:
        longest = min(self._manner.sampling.max_new_tokens, self.limits.tokens) if max_tokens is None else max_tokens
        if longest > self.limits.tokens:
            raise Refused(400, f"max_tokens is {longest}: at most {self.limits.tokens}", param="max_tokens")
        return Sampling(
            max_new_tokens=longest,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            repetition_penalty=asked.repetition_penalty,
            seed=secrets.randbits(62) if asked.seed is None else asked.seed,
        )

    def _encode(self, param: str, text: str) -> list[int]:
        try:
            ids = self._tokenizer.encode(text)
        except UnicodeEncodeError as error:
            raise Refused(400, f"{param}: half a character (a lone surrogate)", param=param) from error
        if len(ids) >= self.limits.tokens:
            raise Refused(400, f"{param} has {len(ids)} tokens: less than {self.limits.tokens}, please", param=param)
        return ids

    def _check_count(self, param: str, count: int) -> None:
        if count > self.limits.candidates:
            raise Refused(400, f"{param} is {count}: at most {self.limits.candidates}", param=param)
