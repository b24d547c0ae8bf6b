"""Conversations: messages with ratings and sources; one JSON object per line.

    {"messages": [{"role": "user", "content": "Who was Ada Lovelace?"},
                  {"role": "assistant", "content": "A mathematician.", "labels": {"sensible": 1, "specific": 0}}]}

A turn of the assistant is a sequence of its messages and its tools'. If it has several, the first is the base
answer, then come queries (`"to": "TS"`), each followed by a tool's message, and the last is the response to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

import orjson

from lamda.config.errors import nearest

Attribute = Literal["sensible", "specific", "interesting", "unsafe", "grounded"]
ATTRIBUTES: tuple[Attribute, ...] = get_args(Attribute)

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)

Addressee = Literal["user", "TS"]

_KEYS = ("role", "content", "to", "labels", "knowledge")


@dataclass(frozen=True)
class Message:
    """A message of one party.

    to: the addressee of an assistant's message; content is a query if it is "TS", the toolset.
    labels: ratings by attribute. knowledge: the sources of the message, as texts, URLs or file:line.
    """

    role: Role
    content: str
    to: Addressee = "user"
    labels: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))
    knowledge: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages in order; at least one."""

    messages: tuple[Message, ...]


def parse_conversation(record: object) -> Conversation:
    """A conversation from its JSON record, where null means absent. Raises ValueError that lists every problem."""
    entries = record.get("messages") if isinstance(record, Mapping) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError("it has no list of messages")
    problems: list[str] = []
    messages: list[Message] = []
    for number, entry in enumerate(entries, start=1):
        found = [f"message {number}: {problem}" for problem in _problems(entry, messages)]
        problems += found
        messages.append(Message("system", "") if found else _message(entry))
    if problems:
        raise ValueError("; ".join(problems))
    return Conversation(tuple(messages))


def to_record(conversation: Conversation) -> dict[str, Any]:
    """The JSON record of a conversation; `parse_conversation` reads it back."""
    return {"messages": [_entry(message) for message in conversation.messages]}


def to_line(conversation: Conversation) -> bytes:
    """The record as a line of a JSON-lines file."""
    return orjson.dumps(to_record(conversation), option=orjson.OPT_APPEND_NEWLINE)


def _message(entry: Mapping[str, Any]) -> Message:
    given = {key: value for key, value in entry.items() if value is not None}
    labels = {name: bool(rating) for name, rating in given.get("labels", {}).items() if rating is not None}
    return Message(
        given["role"],
        given["content"],
        given.get("to", "user"),
        MappingProxyType(labels),
        tuple(given.get("knowledge", ())),
    )


def _entry(message: Message) -> dict[str, Any]:
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.to != "user":
        entry["to"] = message.to
    if message.labels:
        entry["labels"] = {name: int(rating) for name, rating in message.labels.items()}
    if message.knowledge:
        entry["knowledge"] = list(message.knowledge)
    return entry


def _problems(entry: object, before: list[Message]) -> list[str]:
    if not isinstance(entry, Mapping):
        return ["is not a JSON object"]
    entry = {key: value for key, value in entry.items() if value is not None}
    problems = [f"there is no key {key!r}{nearest(str(key), _KEYS)}" for key in entry if key not in _KEYS]
    role, to, labels = entry.get("role"), entry.get("to", "user"), entry.get("labels", {})
    if role not in ROLES:
        problems.append(f"role is {role!r}, not one of {', '.join(ROLES)}")
    if not is_text(entry.get("content")):
        problems.append("content is not text")
    if to not in get_args(Addressee) or (to == "TS" and role != "assistant"):
        problems.append(f"to is {to!r}; an assistant's message is to 'user' or to 'TS', others have no such key")
    if role == "tool" and not (before and (before[-1].to == "TS" or before[-1].role == "tool")):
        problems.append("a tool's message follows no query (no message to 'TS' before it)")
    problems += _label_problems(labels, role)
    knowledge = entry.get("knowledge", [])
    if not (isinstance(knowledge, list) and all(map(is_text, knowledge))):
        problems.append("knowledge is not a list of texts")
    return problems


def _label_problems(labels: object, role: object) -> list[str]:
    if not isinstance(labels, Mapping):
        return ["labels is not a JSON object"]
    labels = {name: rating for name, rating in labels.items() if rating is not None}
    unknown = [name for name in labels if name not in ATTRIBUTES]
    wrong = [name for name in labels if name in ATTRIBUTES and labels[name] not in (0, 1)]
    problems = [f"there is no attribute {name!r}{nearest(str(name), ATTRIBUTES)}" for name in unknown]
    problems += [f"label {name} is {labels[name]!r}, not 0 or 1" for name in wrong]
    if labels and role != "assistant":
        problems.append(f"labels rate an assistant's message, not one of {role!r}")
    return problems


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can encode (without lone surrogates)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
