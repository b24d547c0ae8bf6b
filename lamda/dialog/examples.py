"""Training examples of a conversation: responses, research steps and ratings; some of each in every epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import orjson

from lamda.config.schema import Config
from lamda.data.card import Source
from lamda.data.documents import Document, Encoded, Form
from lamda.data.hashing import permutation
from lamda.data.lanes import RAW_TEXT
from lamda.data.packing import Method
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import ATTRIBUTES, Conversation, Message, parse_conversation, to_record
from lamda.dialog.encoding import Encoding, Example

T = TypeVar("T")


@dataclass(frozen=True)
class Response:
    """Target: the assistant's message after a context."""

    context: tuple[Message, ...]
    response: str
    kind: str = "generative"

    def encode(self, encoding: Encoding, *, max_tokens: int) -> Example:
        """The example, in at most `max_tokens`."""
        return encoding.generative(self.context, self.response, max_tokens=max_tokens)


@dataclass(frozen=True)
class ResearchStep:
    """Target: the assistant's action after its base answer and (query, snippet) pairs."""

    context: tuple[Message, ...]
    base: str
    steps: tuple[tuple[str, str], ...]
    action: Message
    kind: str = "research"

    def encode(self, encoding: Encoding, *, max_tokens: int) -> Example:
        """The example, in at most `max_tokens`."""
        return encoding.research_step(self.context, self.base, self.steps, self.action, max_tokens=max_tokens)


@dataclass(frozen=True)
class Rating:
    """Target: the rating of a response; `kind` is the attribute."""

    context: tuple[Message, ...]
    response: str
    kind: str
    rating: bool

    def encode(self, encoding: Encoding, *, max_tokens: int) -> Example:
        """The example, in at most `max_tokens`."""
        given = self.context, self.response, self.kind
        return encoding.discriminative(*given, rating=self.rating, max_tokens=max_tokens)


def examples_of(conversation: Conversation) -> tuple[list[Response | ResearchStep], list[Rating]]:
    """All generative and all discriminative examples of a conversation, in order.

    A message that is blank, or rated unsafe or not sensible, is not a generative target. The context is what the user
    has read: of a turn with research only its last message, without base answer, queries and snippets.
    """
    generative: list[Response | ResearchStep] = []
    ratings: list[Rating] = []
    seen: list[Message] = []
    for is_turn, group in groupby(conversation.messages, key=lambda message: message.role in ("assistant", "tool")):
        if not is_turn:
            seen += group
            continue
        context, turn = tuple(seen), list(group)
        generative += _generative_examples(context, turn)
        replies = [message for message in turn if message.role == "assistant" and message.to == "user"]
        ratings += [Rating(context, m.content, name, rating) for m in replies for name, rating in m.labels.items()]
        seen += replies[-1:]
    return generative, ratings


def examples_in(document: Document) -> tuple[list[Response | ResearchStep], list[Rating]]:
    """The examples of the conversation whose record is the document's text."""
    return examples_of(parse_conversation(orjson.loads(document.text)))


def _generative_examples(context: tuple[Message, ...], turn: Sequence[Message]) -> Iterator[Response | ResearchStep]:
    base, research = (turn[0].content, turn[1:]) if turn[0].to == "user" else ("", turn)
    if turn[0].to == "user" and _is_good(turn[0]):
        yield Response(context, base)
    steps: list[tuple[str, list[str]]] = []
    for message in research:
        if message.role == "tool":
            steps[-1][1].append(message.content)
            continue
        if _is_good(message):
            taken = tuple((query, "\n".join(snippets)) for query, snippets in steps)
            yield ResearchStep(context, base, taken, message)
        if message.to == "TS":
            steps.append((message.content, []))


def _is_good(message: Message) -> bool:
    is_rated_bad = message.labels.get("unsafe", False) or not message.labels.get("sensible", True)
    return bool(message.content.strip()) and not is_rated_bad


@dataclass(frozen=True)
class Conversations:
    """The form of fine-tuning data (`lamda.data.documents.Form`): some examples of each conversation per epoch.

    They follow a permutation seeded by run, file and line, which continues from epoch to epoch.
    """

    row_length: int
    seed: int
    generative: int
    discriminative: int
    packings: tuple[Method, ...] = ("whole",)
    domains: tuple[str, ...] = ("generative", "research", *ATTRIBUTES)

    @classmethod
    def of(cls, config: Config) -> Conversations:
        """The form of a run's records."""
        data, dialog = config.data, config.dialog
        return cls(data.sequence_length + 1, config.run.seed, dialog.generative, dialog.discriminative)

    @property
    def identity(self) -> dict[str, Any]:
        """See `Form`."""
        return {"dialog": {"generative": self.generative, "discriminative": self.discriminative}}

    def keys_of(self, source: Source) -> None:
        """See `Form`: a conversation is the whole record."""

    def text_of(self, record: Any, source: Source) -> str:
        """The record as JSON. Raises ValueError if it is not a conversation, or has no target."""
        conversation = parse_conversation(record)
        generative, ratings = examples_of(conversation)
        if not (generative and self.generative) and not (ratings and self.discriminative):
            raise ValueError("there is nothing to learn: no target message of the assistant, and no rating")
        return orjson.dumps(to_record(conversation)).decode()

    def pieces(self, document: Document, tokenizer: Tokenizer) -> list[Document]:
        """See `Form`: a conversation is encoded whole."""
        return [document]

    def encode(self, documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[Encoded]]:
        """See `Form`."""
        encoding = Encoding(tokenizer)
        return [[self._encoded(example, encoding) for example in self._chosen(document)] for document in documents]

    def _chosen(self, document: Document) -> list[Response | ResearchStep | Rating]:
        generative, ratings = examples_in(document)
        key = (self.seed, document.file, document.line)
        return [
            *_items_of_epoch(generative, self.generative, document.epoch, (*key, 0)),
            *_items_of_epoch(ratings, self.discriminative, document.epoch, (*key, 1)),
        ]

    def _encoded(self, example: Response | ResearchStep | Rating, encoding: Encoding) -> Encoded:
        ids, loss_mask = example.encode(encoding, max_tokens=self.row_length)
        return Encoded(np.array(ids, np.uint32), np.array(loss_mask), example.kind)


def form_of(config: Config) -> Form:
    """The form of a run's records: conversations or raw text."""
    return Conversations.of(config) if config.data.packing in Conversations.packings else RAW_TEXT


def _items_of_epoch(items: list[T], count: int, epoch: int, key: tuple[int, ...]) -> list[T]:
    """The `count` items of an epoch, or all: a permutation, read cyclically."""
    if not items:
        return []
    count = min(count, len(items))
    order = permutation(len(items), *key)
    return [items[order[(epoch * count + place) % len(items)]] for place in range(count)]
