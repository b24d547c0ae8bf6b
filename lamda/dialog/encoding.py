"""Conversations as token ids: text through the tokenizer, structure by control symbols only (paper, section 6).

    <end_of_document> { SYSTEM | USER | ASSISTANT text }... RESPONSE response <end_of_document>
    <end_of_document> { SYSTEM | USER | ASSISTANT text }... RESPONSE response SENSIBLE 1
    <end_of_document> { ... }... RESPONSE base { TS query RESULT snippet }... then
        TS query <end_of_document>   or   USER response <end_of_document>

The tokenizer never produces a control symbol from text, so text cannot imitate structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from sys import maxsize
from typing import NamedTuple

from lamda.config.errors import UserError
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import Message

RESULT = "spare_12"
"""The symbol before a tool's message: a spare one, so that older tokenizers keep their piece names."""

_SYMBOLS = {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT", "tool": RESULT}

_MIN_IDS = 8
"""Minimum ids of a query or snippet; pairs that would be cut below it are left out."""


class Context(NamedTuple):
    """What a model reads of a conversation.

    turns_left_out, messages_left_out: the oldest ones, which did not fit. A turn is a user's message and what answers
    it.
    system_cut, last_message_cut: whether even system messages and the last message did not fit together.
    """

    ids: list[int]
    turns_left_out: int = 0
    messages_left_out: int = 0
    system_cut: bool = False
    last_message_cut: bool = False

    def note(self) -> str:
        """What the model did not read, for people; empty if it read everything."""
        found = (
            (self.turns_left_out, f"the oldest turns no longer fit, and were not read: {self.turns_left_out}"),
            (self.system_cut, "of the system text only the beginning fits"),
            (self.last_message_cut, "of this message only the end fits"),
        )
        return "; ".join(text for is_so, text in found if is_so)


class Example(NamedTuple):
    """Ids to train on, and whether each is a target: [n] both; the first never is."""

    ids: list[int]
    loss_mask: list[bool]


class Encoding:
    """The encoding of conversations with one tokenizer.

    Attributes:
        end: the symbol that begins every context and ends every text of the model.
        response_symbol, ts, user, result: ids of RESPONSE, TS, USER and RESULT.
        rating_ids: ids of "0" and "1".
        stop_ids: all control symbols: sampled text ends before the first of them. They include TS and USER, so
            read the symbol that routes a research step before sampling text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Bind a tokenizer. Raises UserError if "0" or "1" is not a single token."""
        self._tokenizer = tokenizer
        symbols = tokenizer.symbols
        self.end = tokenizer.end_of_document
        self.response_symbol, self.ts = symbols["RESPONSE"], symbols["TS"]
        self.user, self.result = symbols["USER"], symbols[RESULT]
        self.stop_ids = frozenset(symbols.values())
        self.rating_ids = (self._rating_id("0"), self._rating_id("1"))

    def attribute(self, name: str) -> int:
        """The symbol of an attribute (a name of `conversation.ATTRIBUTES`)."""
        return self._tokenizer.symbols[name.upper()]

    def text(self, text: str) -> list[int]:
        """Ids of a text, such as a response without its end; never a control symbol."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without control symbols."""
        return self._tokenizer.decode(ids)

    def context(self, messages: Sequence[Message], *, max_tokens: int = maxsize) -> list[int]:
        """Ids of the conversation so far, from EOS to RESPONSE; see `fitted_context`."""
        return self.fitted_context(messages, max_tokens=max_tokens).ids

    def fitted_context(self, messages: Sequence[Message], *, max_tokens: int, as_lines: bool = False) -> Context:
        """The conversation so far, from EOS to RESPONSE, or as lines of text for a model without fine-tuning.

        Beyond `max_tokens` (at least 4), the oldest turns are left out, each as a whole, but never system messages or
        the last message. If even these are too long, each of the two gets half, and what the other leaves: system
        messages keep their beginning, the last message keeps its end.
        """
        piece, symbols = (self._line, 0) if as_lines else (self._piece, 1)
        end = [] if as_lines else [self.response_symbol]
        room = max_tokens - 1 - len(end)
        kept, left, system_cut, last_cut = _fitting(messages, room, piece, symbols=symbols)
        ids = [self.end, *chain.from_iterable(kept), *end]
        return Context(ids, len(left), sum(map(len, left)), system_cut, last_cut)

    def research_context(
        self, messages: Sequence[Message], base: str, steps: Sequence[tuple[str, str]], *, max_tokens: int = maxsize
    ) -> list[int]:
        """Ids up to the symbol that routes a research step: the context, the base answer and (query, snippet) pairs.

        Beyond `max_tokens`, base, queries and snippets get half, and what the context leaves. Short ones stay whole,
        the others are cut at their ends to equal shares; if a share is below `_MIN_IDS` ids, the oldest pairs are left
        out.
        """
        pieces = [self.text(base)]
        for query, snippet in steps:
            pieces += [[self.ts, *self.text(query)], [self.result, *self.text(snippet)]]
        room = max(max_tokens // 2, max_tokens - len(self.context(messages, max_tokens=max_tokens)))
        shares = _divided([len(piece) for piece in pieces], room)
        while len(pieces) > 3 and any(share < min(_MIN_IDS, len(p)) for share, p in zip(shares, pieces, strict=True)):
            del pieces[1:3]
            shares = _divided([len(piece) for piece in pieces], room)
        research = [id for piece, share in zip(pieces, shares, strict=True) for id in piece[:share]]
        return self.context(messages, max_tokens=max_tokens - len(research)) + research

    def generative(self, context: Sequence[Message], response: str, *, max_tokens: int) -> Example:
        """A response and its end as targets after their context.

        The context shrinks to no less than half of `max_tokens`; a response that is still too long is cut and has
        no EOS.
        """
        targets = [*self.text(response), self.end]
        room = max(max_tokens - len(targets), max_tokens // 2)
        return _fitted(self.context(context, max_tokens=room), targets, max_tokens)

    def discriminative(
        self, context: Sequence[Message], response: str, attribute: str, *, rating: bool, max_tokens: int
    ) -> Example:
        """A rating as the only target, after context, response and the attribute's symbol; cut as `generative`."""
        ids, room = self.text(response), max_tokens - 2
        given = [*self.context(context, max_tokens=max(room - len(ids), room // 2)), *ids][:room]
        return _fitted([*given, self.attribute(attribute)], [self.rating_ids[rating]], max_tokens)

    def research_step(
        self,
        context: Sequence[Message],
        base: str,
        steps: Sequence[tuple[str, str]],
        action: Message,
        *,
        max_tokens: int,
    ) -> Example:
        """The assistant's action after its base answer and these steps: a query, or the response to the user.

        Its symbol (TS or USER), its text and the end are targets. Cut as `generative`.
        """
        symbol = self.ts if action.to == "TS" else self.user
        targets = [symbol, *self.text(action.content), self.end]
        room = max(max_tokens - len(targets), max_tokens // 2)
        return _fitted(self.research_context(context, base, steps, max_tokens=room), targets, max_tokens)

    def _piece(self, message: Message) -> list[int]:
        symbol = "TS" if message.to == "TS" else _SYMBOLS[message.role]
        return [self._tokenizer.symbols[symbol], *self.text(message.content)]

    def _line(self, message: Message) -> list[int]:
        return self.text(" ".join(message.content.split()) + "\n")

    def _rating_id(self, digit: str) -> int:
        ids = self._tokenizer.encode(digit)
        if len(ids) != 1:
            raise UserError(f"the tokenizer writes {digit!r} as {len(ids)} ids; ratings need one: use another one")
        return ids[0]


def _fitting(
    messages: Sequence[Message], room: int, piece: Callable[[Message], list[int]], *, symbols: int
) -> tuple[list[list[int]], list[list[int]], bool, bool]:
    """The ids of each message, none if it is left out, `room` in all; the turns that are; then as in `Context`.

    symbols: the number of ids at a message's beginning that are kept where its beginning is cut.
    """
    kept: list[list[int]] = [[] for _ in messages]
    if not messages:
        return kept, [], False, False
    *earlier, last = range(len(messages))
    ids, system_cut = piece(messages[last]), False
    for_system = max(room // 2, room - len(ids))
    for number in earlier:
        if messages[number].role == "system":
            whole = piece(messages[number])
            kept[number] = whole[:for_system] if len(whole) <= for_system or for_system > 1 else []
            for_system -= len(kept[number])
            system_cut |= len(kept[number]) < len(whole)
    room -= sum(map(len, kept))
    kept[last] = [*ids[:symbols], *ids[max(symbols, len(ids) - room + symbols) :]]
    room -= len(kept[last])
    turns = _turns(messages, earlier)
    for left in range(len(turns), 0, -1):
        pieces = {number: piece(messages[number]) for number in turns[left - 1]}
        room -= sum(map(len, pieces.values()))
        if room < 0:
            return kept, turns[:left], system_cut, len(kept[last]) < len(ids)
        for number, found in pieces.items():
            kept[number] = found
    return kept, [], system_cut, len(kept[last]) < len(ids)


def _turns(messages: Sequence[Message], numbers: Iterable[int]) -> list[list[int]]:
    """These messages but the system's, by turn."""
    turns: list[list[int]] = []
    for number in numbers:
        if messages[number].role == "user" or (messages[number].role != "system" and not turns):
            turns.append([])
        if messages[number].role != "system":
            turns[-1].append(number)
    return turns


def _divided(needs: Sequence[int], room: int) -> list[int]:
    """Divide the room: each need in full, or an equal share of what smaller ones leave; later ones get the rest."""
    shares = [0] * len(needs)
    for rank, number in enumerate(sorted(range(len(needs)), key=lambda number: (needs[number], number))):
        shares[number] = min(needs[number], room // (len(needs) - rank))
        room -= shares[number]
    return shares


def _fitted(given: list[int], targets: list[int], max_tokens: int) -> Example:
    targets = targets[: max_tokens - len(given)]
    return Example(given + targets, [False] * len(given) + [True] * len(targets))
