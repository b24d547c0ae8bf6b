"""Published dialogue datasets: converters from each format's records to conversations.

Ratings become labels by these rules:

- Topical-Chat. Its partner rated each message; sensible, specific and interesting are hierarchical, as in the paper:

      Poor, Not Good: 0 0 0      Passable: 1 0 0      Good: 1 1 0      Excellent: 1 1 1

  `grounded` is 1 if the message names a source of its reading set (FS1, AS2, ...), 0 if it has only personal
  knowledge. A message without a rating (some first and last ones) has only `grounded`. Each dialogue gives two
  conversations, one with either party as the assistant.
- hh-rlhf. The last message of `chosen` is unsafe 0, that of `rejected` unsafe 1: which of two answers a person
  found less harmful, not whether it was harmful. A text with an empty last message is skipped.
- Taskmaster (1 to 4) and OASST1 get no labels; OASST1's trees become the threads of highest rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from lamda.dialog.conversation import Conversation, Message, Role, parse_conversation

_RATINGS = {"Poor": (0, 0, 0), "Not Good": (0, 0, 0), "Passable": (1, 0, 0), "Good": (1, 1, 0), "Excellent": (1, 1, 1)}
_READING_SET = re.compile(r"[AF]S\d")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_OASST1_OPTIONAL = {"parent_id": (str,), "rank": (int, float), "deleted": (bool,), "review_result": (bool,)}
_HH_ROLES: Mapping[str, Role] = {"Human": "user", "Assistant": "assistant"}
_OASST1_ROLES: Mapping[str, Role] = {"prompter": "user", "assistant": "assistant"}
_SPEAKERS: Mapping[str, Role] = {"USER": "user", "user": "user", "ASSISTANT": "assistant", "assistant": "assistant"}


class Numbered(NamedTuple):
    """A record, or the ValueError of a line that cannot be parsed, and its line number, from 1."""

    line: int
    record: Any


Converter = Callable[[Iterable[Numbered]], Iterator[tuple[int, Conversation | ValueError]]]
"""Records to conversations, or to the error of a record, each with its line number."""


def _each(convert: Callable[[Any], Iterable[Conversation]]) -> Converter:
    """A converter of independent records."""

    def converter(records: Iterable[Numbered]) -> Iterator[tuple[int, Conversation | ValueError]]:
        for line, record in records:
            try:
                if isinstance(record, ValueError):
                    raise record
                yield from [(line, conversation) for conversation in convert(record)]
            except ValueError as error:
                yield line, error

    return converter


def _topical_chat(record: Any) -> Iterator[Conversation]:
    entries = enumerate(_list(record, "messages", "content"), start=1)
    messages = [_topical_message(entry, f"message {number}") for number, entry in entries]
    for me in ("agent_1", "agent_2"):
        yield _joined([message if who == me else Message("user", message.content) for who, message in messages])


def _topical_message(entry: Mapping[str, Any], place: str) -> tuple[str, Message]:
    """The party, and its message with the role of the assistant."""
    text, who = _given(entry, "content", "message"), _given(entry, "role", "agent")
    if who not in ("agent_1", "agent_2") or not isinstance(text, str):
        raise ValueError(f"{place}: it has no text of agent_1 or agent_2")
    rating = _given(entry, "rating")
    if rating in (None, ""):
        labels = {}
    elif isinstance(rating, str) and rating in _RATINGS:
        labels = dict(zip(("sensible", "specific", "interesting"), map(bool, _RATINGS[rating]), strict=True))
    else:
        raise ValueError(f"{place}: rating is {rating!r}, not one of {', '.join(_RATINGS)}")
    sources = _given(entry, "knowledge", "knowledge_source")
    if sources is not None and not (isinstance(sources, list) and all(isinstance(each, str) for each in sources)):
        raise ValueError(f"{place}: knowledge is not a list of texts")
    labels["grounded"] = any(_READING_SET.fullmatch(source) for source in sources or ())
    return who, Message("assistant", text, labels=labels)


def _hh_rlhf(record: Any) -> Iterator[Conversation]:
    for name, unsafe in (("chosen", False), ("rejected", True)):
        text = record.get(name) if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise ValueError(f"it has no text {name!r}")
        before, *parts = _HH_TURN.split(text)
        if before.strip() or not parts:
            raise ValueError(f"{name} does not begin with a turn of Human or Assistant")
        roles = [_HH_ROLES[who] for who in parts[::2]]
        messages = [Message(role, part.strip()) for role, part in zip(roles, parts[1::2], strict=True)]
        if roles[-1] == "assistant" and not parts[-1].strip():
            continue
        *earlier, last = _joined([message for message in messages if message.content]).messages
        if last.role != "assistant":
            raise ValueError(f"{name} does not end with a message of Assistant")
        yield Conversation((*earlier, Message("assistant", last.content, labels={"unsafe": unsafe})))


def _taskmaster(record: Any) -> Iterator[Conversation]:
    messages = []
    for number, entry in enumerate(_list(record, "utterances", "text"), start=1):
        speaker, text = entry.get("speaker"), entry.get("text")
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None or not isinstance(text, str):
            raise ValueError(f"utterance {number}: it has no text of a USER or ASSISTANT")
        messages.append(Message(role, text))
    yield _joined(messages)


def _oasst1(records: Iterable[Numbered]) -> Iterator[tuple[int, Conversation | ValueError]]:
    """Rows of messages in any order; each root prompt gives one thread, its best-ranked path.

    A thread follows the child of the lowest rank (rows without a rank last, then in file order), leaves out
    deleted and rejected rows, and ends with the assistant's last message.
    """
    rows: dict[str, Numbered] = {}
    children: dict[str | None, list[Numbered]] = {}
    for numbered in records:
        row = numbered.record
        problem = row if isinstance(row, ValueError) else _oasst1_problem(row, rows)
        if problem is not None:
            yield numbered.line, ValueError(problem)
            continue
        rows[row["message_id"]] = numbered
        children.setdefault(row.get("parent_id"), []).append(numbered)
    for numbered in rows.values():
        parent = numbered.record.get("parent_id")
        if parent is not None and parent not in rows:
            yield numbered.line, ValueError(f"parent_id {parent!r} is no row's message_id")
    for numbered in _circular(rows):
        yield numbered.line, ValueError(f"message_id {numbered.record['message_id']!r} is among its own ancestors")
    for root in children.get(None, []):
        thread: list[Message] = []
        current: Numbered | None = root
        while current is not None and _is_fit(current.record):
            row = current.record
            thread.append(Message(_OASST1_ROLES[row["role"]], row["text"]))
            answers = [each for each in children.get(row["message_id"], []) if _is_fit(each.record)]
            current = min(answers, key=_rank, default=None)
        while thread and thread[-1].role != "assistant":
            thread.pop()
        if thread:
            yield root.line, _joined(thread)


def _oasst1_problem(row: Any, known: Mapping[str, Numbered]) -> str | None:
    if not isinstance(row, Mapping) or not isinstance(row.get("message_id"), str):
        return "it has no message_id"
    if row["message_id"] in known:
        return f"message_id {row['message_id']!r} is line {known[row['message_id']].line}'s already"
    if row.get("role") not in ("prompter", "assistant"):
        return f"role is {row.get('role')!r}, not prompter or assistant"
    if not isinstance(row.get("text"), str):
        return "it has no text"
    for key, kind in _OASST1_OPTIONAL.items():
        if row.get(key) is not None and type(row[key]) not in kind:
            return f"{key} is {row[key]!r}, not {' or '.join(each.__name__ for each in kind)}"
    return None


def _circular(rows: Mapping[str, Numbered]) -> Iterator[Numbered]:
    """The rows that are their own ancestors, each once."""
    seen: set[str] = set()
    for name in rows:
        path: dict[str, None] = {}
        current: str | None = name
        while current is not None and current in rows and current not in seen and current not in path:
            path[current] = None
            current = rows[current].record.get("parent_id")
        if current is not None and current in path:
            yield from (rows[each] for each in [*path][[*path].index(current) :])
        seen.update(path)


def _is_fit(row: Mapping[str, Any]) -> bool:
    return not row.get("deleted") and row.get("review_result") is not False


def _rank(numbered: Numbered) -> tuple[float, int]:
    rank = numbered.record.get("rank")
    return (float("inf") if rank is None else rank, numbered.line)


def _given(entry: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of these keys that is present and not null."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _list(record: Any, *names: str) -> Sequence[Mapping[str, Any]]:
    """The record's list of objects under the first name; the second, a key of each, is for the message."""
    found = record.get(names[0]) if isinstance(record, Mapping) else None
    if not isinstance(found, list) or not found or not all(isinstance(entry, Mapping) for entry in found):
        raise ValueError(f"it has no list of {names[0]} with {names[1]}")
    return found


def _joined(messages: Sequence[Message]) -> Conversation:
    """The conversation, with consecutive messages of one party joined; labels are the last one's."""
    if not messages:
        raise ValueError("it has no message with text")
    joined = []
    for role, group in groupby(messages, key=lambda message: message.role):
        parts = list(group)
        joined.append(Message(role, "\n".join(message.content for message in parts), labels=parts[-1].labels))
    return Conversation(tuple(joined))


FORMATS: Mapping[str, Converter] = {
    "topical-chat": _each(_topical_chat),
    "hh-rlhf": _each(_hh_rlhf),
    "taskmaster": _each(_taskmaster),
    "oasst1": _oasst1,
    "chat": _each(lambda record: [parse_conversation(record)]),
}
