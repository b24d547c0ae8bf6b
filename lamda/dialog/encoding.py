"""Conversations as ids: text through the tokenizer, structure through control symbols alone (paper, section 6).

    <end_of_document> { SYSTEM | USER | ASSISTANT text }... RESPONSE response <end_of_document>
    <end_of_document> { SYSTEM | USER | ASSISTANT text }... RESPONSE response SENSIBLE 1
    <end_of_document> { ... }... RESPONSE base { TS query RESULT snippet }... then
        TS query <end_of_document>   or   USER response <end_of_document>

The tokenizer never makes a control symbol of text, so that nothing anybody writes can pass for structure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from lamda.config.errors import UserError
from lamda.data.tokenizer import Tokenizer
from lamda.dialog.conversation import Message

RESULT = "spare_12"
"""The symbol before a tool's message: a spare one, so that tokenizers made before it keep their pieces' names."""

_OF_ROLE = {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT", "tool": RESULT}


_FEW = 8
"""Ids of a research step's query or snippet; one that must be cut to fewer is not worth its place."""


class Example(NamedTuple):
    """Ids to train on, and for each whether it is a target: [n] both; the first never is one."""

    ids: list[int]
    scored: list[bool]


class Encoding:
    """The encoding of conversations with one tokenizer.

    Attributes:
        end: the symbol that begins every context and ends every text that the model writes.
        response_symbol, ts, user, result: ids of RESPONSE, TS, USER and RESULT.
        rating_ids: ids of "0" and of "1".
        stop_ids: all control symbols: whatever text the model writes ends before the first of them. TS and
            USER are among them, so read the symbol that routes a research step before text is sampled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Bind a tokenizer. Raises UserError where it has no single id for "0" or for "1"."""
        self._tokenizer = tokenizer
        symbols = tokenizer.symbols
        self.end = tokenizer.end_of_document
        self.response_symbol, self.ts, self.user, self.result = (
            symbols[name] for name in ("RESPONSE", "TS", "USER", RESULT)
        )
        self.stop_ids = frozenset(symbols.values())
        self.rating_ids = (self._single("0"), self._single("1"))

    def attribute(self, name: str) -> int:
        """The symbol of an attribute (a name of `conversation.ATTRIBUTES`)."""
        return self._tokenizer.symbols[name.upper()]

    def text(self, text: str) -> list[int]:
        """Ids of a text, never a control symbol among them."""
        return self._tokenizer.encode(text)

    def response(self, text: str) -> list[int]:
        """Ids of a response without its end: what follows `context`."""
        return self.text(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control symbols vanish."""
        return self._tokenizer.decode(ids)

    def context(self, messages: Sequence[Message], *, max_tokens: int | None = None) -> list[int]:
        """Ids of what was said so far, from the end symbol to RESPONSE.

        Where they are more than `max_tokens` (at least 4), the oldest messages are left out, but never system
        messages or the last one. Where even these are too many, each of the two may have half, and what the
        other does not need: of system messages the beginning stays, of the last message the end.
        """
        whole = max_tokens is None
        pieces = map(self._piece, messages) if whole else self._fitting(messages, max_tokens - 2)
        return [self.end, *chain.from_iterable(pieces), self.response_symbol]

    def research_context(
        self,
        messages: Sequence[Message],
        base: str,
        steps: Sequence[tuple[str, str]],
        *,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Ids up to the symbol that routes a research step: the context, the base answer and (query, snippet) pairs.

        Where they are more than `max_tokens`, base, queries and snippets may have half, and what the context does
        not need. Short ones stay whole, the others are cut at their ends to equal shares; where a share would be
        of few ids, the oldest pairs are left out.
        """
        pieces = [self.text(base)]
        for query, snippet in steps:
            pieces += [[self.ts, *self.text(query)], [self.result, *self.text(snippet)]]
        if max_tokens is None:
            return self.context(messages) + list(chain.from_iterable(pieces))
        room = max(max_tokens // 2, max_tokens - len(self.context(messages, max_tokens=max_tokens)))
        shares = _shares([len(piece) for piece in pieces], room)
        while len(pieces) > 3 and any(share < min(_FEW, len(p)) for share, p in zip(shares, pieces, strict=True)):
            del pieces[1:3]
            shares = _shares([len(piece) for piece in pieces], room)
        said = [id for piece, share in zip(pieces, shares, strict=True) for id in piece[:share]]
        return self.context(messages, max_tokens=max_tokens - len(said)) + said

    def generative(self, context: Sequence[Message], response: str, *, max_tokens: int) -> Example:
        """A response and its end as targets after their context.

        The context gives way down to half of `max_tokens`; a response that is still too long is cut at its
        end, and has no end symbol then.
        """
        targets = [*self.response(response), self.end]
        return _fitted(
            self.context(context, max_tokens=max(max_tokens - len(targets), max_tokens // 2)), targets, max_tokens
        )

    def discriminative(
        self, context: Sequence[Message], response: str, attribute: str, *, rating: bool, max_tokens: int
    ) -> Example:
        """A rating as the one target, after context, response and the attribute's symbol; cut as `generative`."""
        ids, room = self.response(response), max_tokens - 2
        said = self.context(context, max_tokens=max(room - len(ids), room // 2))
        judged = [*said, *ids][:room]
        return _fitted([*judged, self.attribute(attribute)], [self.rating_ids[rating]], max_tokens)

    def research_step(
        self,
        context: Sequence[Message],
        base: str,
        steps: Sequence[tuple[str, str]],
        action: Message,
        *,
        max_tokens: int,
    ) -> Example:
        """What the assistant does after its base answer and these steps: a query, or the response that the user reads.

        Its symbol (TS or USER), its text and the end are targets. Cut as `generative`.
        """
        symbol = self.ts if action.to == "TS" else self.user
        targets = [symbol, *self.text(action.content), self.end]
        room = max(max_tokens - len(targets), max_tokens // 2)
        return _fitted(self.research_context(context, base, steps, max_tokens=room), targets, max_tokens)

    def _fitting(self, messages: Sequence[Message], room: int) -> list[list[int]]:
        """The ids of each message, or none of them, as `context` says; `room` ids in all."""
        kept: list[list[int]] = [[] for _ in messages]
        if not messages:
            return kept
        *earlier, last = range(len(messages))
        ids = self._piece(messages[last])
        for_system = max(room // 2, room - len(ids))
        for number in earlier:
            if messages[number].role == "system":
                piece = self._piece(messages[number])
                kept[number] = piece[:for_system] if len(piece) <= for_system or for_system > 1 else []
                for_system -= len(kept[number])
        room -= sum(map(len, kept))
        kept[last] = [ids[0], *ids[max(1, len(ids) - room + 1) :]]
        room -= len(kept[last])
        for number in reversed(earlier):
            if messages[number].role != "system":
                ids = self._piece(messages[number])
                room -= len(ids)
                if room < 0:
                    break
                kept[number] = ids
        return kept

    def _piece(self, message: Message) -> list[int]:
        return [self._symbol(message), *self.text(message.content)]

    def _symbol(self, message: Message) -> int:
        return self._tokenizer.symbols["TS" if message.to == "TS" else _OF_ROLE[message.role]]

    def _single(self, digit: str) -> int:
        ids = self._tokenizer.encode(digit)
        if len(ids) != 1:
            raise UserError(
                f"the tokenizer writes {digit!r} as {len(ids)} ids; ratings need one: use another tokenizer"
            )
        return ids[0]


def _shares(needs: Sequence[int], room: int) -> list[int]:
    """How much of the room each need gets: all, or else an equal share of what smaller ones leave, later ones more."""
    shares = [0] * len(needs)
    for rank, number in enumerate(sorted(range(len(needs)), key=lambda number: (needs[number], number))):
        shares[number] = min(needs[number], room // (len(needs) - rank))
        room -= shares[number]
    return shares


def _fitted(given: list[int], targets: list[int], max_tokens: int) -> Example:
    targets = targets[: max_tokens - len(given)]
    return Example(given + targets, [False] * len(given) + [True] * len(targets))
