"""What the server does for a request, apart from HTTP: completions, and replies of the speaker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from lamda.data.tokenizer import Tokenizer
from lamda.dialog.encoding import Encoding
from lamda.dialog.server.admission import Ticket
from lamda.dialog.server.choices import ChoiceText
from lamda.dialog.server.limits import Limits
from lamda.dialog.server.protocol import ChatMessage, ChatRequest, CompletionRequest, Refused
from lamda.dialog.server.scheduler import Scheduler
from lamda.dialog.speaker import Manner, Reply, Speaker
from lamda.dialog.tools.toolset import Toolset
from lamda.inference.cache import Prefix
from lamda.inference.generation import Candidates, OnToken, prefill_pieces
from lamda.inference.sampling import Sampling
from lamda.model import LaMDA

_JUDGED = 9
"""Rows of a research step's response and its judgement: P(attribute) of four attributes, two ratings each."""


@dataclass(frozen=True)
class Choice:
    """A finished choice of a completion."""

    text: str
    reason: Literal["stop", "length"]
    tokens: int


@dataclass(frozen=True)
class Spoken:
    """A reply, why it ends where it does, and how many tokens were generated for its text: none for a refusal."""

    reply: Reply
    reason: Literal["stop", "length", "content_filter"]
    tokens: int


class Service:
    """One model behind a scheduler. Its methods block and may be called from many threads.

    Attributes:
        name: what clients call the model.
        limits: see `Limits`.
        scheduler: the thread that does all work on the model.
        token_bytes: of a token's keys and values.
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
        config = model.config
        self.token_bytes = 2 * config.n_layers * config.n_heads * config.d_head * model.final_norm.scale.element_size()
        self._model, self._tokenizer = model, tokenizer
        self._manner, self._has_tools = manner or Manner(), toolset is not None
        self._sequence_length = sequence_length
        self._token_length = max(len(tokenizer.utf8(id)) for id in range(tokenizer.vocab_size))
        self._stop_ids = Encoding(tokenizer).stop_ids
        self._speaker = partial(
            Speaker, model, tokenizer, sequence_length=sequence_length, is_tuned=is_tuned, toolset=toolset
        )

    def complete(
        self, asked: CompletionRequest, *, ticket: Ticket, on_text: Callable[[int, str], None] | None = None
    ) -> tuple[list[Choice], int]:
        """The choices and the number of the prompts' tokens; `on_text` gets (number, text) as it comes."""
        self._check_count("prompt, times n," if len(asked.prompt) > 1 else "n", asked.n * len(asked.prompt), param="n")
        prompts = [self._ids(prompt) for prompt in asked.prompt]
        sampling = replace(self._sampling(asked, asked.max_tokens), stop_ids=self._stop_ids)
        ticket.reserve(max(map(len, prompts)) + asked.n * sampling.max_new_tokens)
        choices: list[Choice] = []
        for ids in prompts:
            texts = [ChoiceText(self._tokenizer, asked.stop) for _ in range(asked.n)]
            choices += self._choices(ids, texts, sampling, ticket, partial(_tell, on_text, len(choices)))
        return choices, sum(map(len, prompts))

    def _choices(
        self,
        ids: Sequence[int],
        texts: Sequence[ChoiceText],
        sampling: Sampling,
        ticket: Ticket,
        tell: Callable[[int, str], None],
    ) -> list[Choice]:
        """Those of one prompt."""

        def on_token(number: int, id: int) -> bool:
            tell(number, texts[number].add(id))
            return texts[number].stopped

        found = self.scheduler.sample(
            self.scheduler.run(prefill_pieces(self._model, ids), tokens=len(ids), ticket=ticket),
            count=len(texts),
            sampling=sampling,
            ticket=ticket,
            on_token=on_token,
        )
        for number, text in enumerate(texts):
            tell(number, text.end())
        ends = zip(texts, found.stopped, found.ids, strict=True)
        return [Choice(t.text, "stop" if s or t.stopped else "length", len(own)) for t, s, own in ends]

    def reply(self, asked: ChatRequest, *, ticket: Ticket) -> Spoken:
        """The speaker's reply to the conversation."""
        if asked.messages[-1].role == "assistant":
            raise Refused(400, "messages: the last one is the assistant's own; end with the user's", param="messages")
        count = asked.candidates or self._manner.candidates
        self._check_count("candidates", count, param="candidates")
        manner = replace(
            self._manner,
            candidates=count,
            threshold=self._threshold(asked.threshold),
            sampling=self._sampling(asked, asked.max_completion_tokens or asked.max_tokens),
        )
        rows = count + (_JUDGED if self._has_tools else 0)
        prefixes = 3 if self._has_tools else 1
        ticket.reserve(prefixes * self._sequence_length + rows * manner.sampling.max_new_tokens)
        ended: dict[str, tuple[bool, int]] = {}

        def sample(prefix: Prefix, *, count: int, sampling: Sampling, on_token: OnToken | None = None) -> Candidates:
            found = self.scheduler.sample(prefix, count=count, sampling=sampling, ticket=ticket, on_token=on_token)
            for ids, stopped in zip(found.ids, found.stopped, strict=True):
                text = self._tokenizer.decode(ids).strip()
                ended[text] = max((stopped, len(ids)), ended.get(text, (False, 0)))
            return found

        speaker = self._speaker(sample=sample, run=partial(self.scheduler.run, ticket=ticket))
        most = self._sequence_length * self._token_length  # characters at the end of a message that can have room
        messages = [replace(each, content=each.content[-most:]) for each in map(ChatMessage.to_message, asked.messages)]
        reply = speaker.reply(messages, manner)
        if reply.refused:
            return Spoken(reply, "content_filter", 0)
        stopped, tokens = ended[reply.text]
        return Spoken(reply, "stop" if stopped else "length", tokens)

    def _threshold(self, asked: float | None) -> float:
        """The operator's is an upper bound: a client may ask for a stricter filter, and not for a weaker one."""
        most = self._manner.threshold
        if asked is not None and asked > most:
            raise Refused(400, f"threshold is {asked:g}: at most {most:g} on this server", param="threshold")
        return most if asked is None else asked

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

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's, after the symbol that begins every document; ids may have it already, and no other symbol."""
        end = self._tokenizer.end_of_document
        if isinstance(prompt, str):
            if len(prompt) > self.limits.tokens * self._token_length:  # not encoded only to be refused
                raise Refused(400, f"prompt has more than {self.limits.tokens} tokens", param="prompt")
            ids = self._tokenizer.encode(prompt)
        else:
            ids = prompt[1:] if prompt and prompt[0] == end else prompt
        if len(ids) >= self.limits.tokens:
            raise Refused(400, f"prompt has {len(ids)} tokens: less than {self.limits.tokens}, please", param="prompt")
        if not isinstance(prompt, str):
            for id in ids:
                if not 0 <= id < self._tokenizer.vocab_size or id in self._stop_ids:
                    raise Refused(400, f"prompt: {str(id)[:20]} is not the id of a text's token", param="prompt")
        return [end, *ids]

    def _check_count(self, name: str, count: int, *, param: str) -> None:
        if count > self.limits.candidates:
            raise Refused(400, f"{name} is {count}: at most {self.limits.candidates}", param=param)


def _tell(on_text: Callable[[int, str], None] | None, first: int, number: int, text: str) -> None:
    if text and on_text is not None:
        on_text(first + number, text)
