"""Tool use on held-out questions: whether the model calls, whether its call is right, and whether its answer uses it.

A reference turn that calls tools is right by what it finds, not by its words: the passage that its answer names as
knowledge, or, without knowledge, the result that has no source, such as a number. The other turns need no call.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import orjson

from lamda.config.errors import UserError
from lamda.data.hashing import permutation
from lamda.data.held_out import HeldOut
from lamda.dialog.conversation import Conversation, Message, parse_conversation
from lamda.dialog.examples import Conversations, ResearchStep, Response, examples_of
from lamda.dialog.tools.result import Result
from lamda.dialog.tools.toolset import Toolset

if TYPE_CHECKING:
    from lamda.dialog.speaker import Reply, Speaker

Kind = Literal["passage", "result", "no call"]
KINDS: tuple[Kind, ...] = get_args(Kind)

QUOTED_WORDS = 5
"""An answer uses a passage if it has so many consecutive words of it."""


class Turn(NamedTuple):
    """An answer after a context that a user's message ends. calls: the queries before it."""

    context: tuple[Message, ...]
    calls: tuple[str, ...]
    answer: Message

    @property
    def kind(self) -> Kind:
        """What the answer rests on."""
        if not self.calls:
            return "no call"
        return "passage" if self.answer.knowledge else "result"


@dataclass(frozen=True)
class Outcome:
    """What a model did with a turn. unaided: whether the base answer already has what the reference finds."""

    kind: Kind
    called: bool
    found: bool = False
    used: bool = False
    unaided: bool = False


def turns_of(conversation: Conversation) -> Iterator[Turn]:
    """The turns of the assistant that answer a user; those with a blank or badly rated answer are left out."""
    examples, _ = examples_of(conversation)
    researched = {id(example.context) for example in examples if isinstance(example, ResearchStep)}
    for example in examples:
        if not example.context or example.context[-1].role != "user":
            continue
        if isinstance(example, Response):
            if id(example.context) not in researched:
                yield Turn(example.context, (), Message("assistant", example.response))
        elif example.action.to == "user":
            yield Turn(example.context, tuple(query for query, _ in example.steps), example.action)


def evaluate_tool_use(
    path: Path, toolset: Toolset, *, files: Sequence[str] | None, examples: int | None
) -> dict[str, Any]:
    """The report for a checkpoint on held-out conversations, at most `examples` turns of each kind.

    Base answers are the likeliest text, and nothing is filtered. Raises UserError for a model that was not fine-tuned,
    without turns, and if the tools do not find what the reference found.
    """
    from lamda.console import Progress
    from lamda.dialog.speaker import ReplyOptions, Speaker
    from lamda.inference.loading import load_run
    from lamda.inference.sampling import Sampling
    from lamda.training.inputs import saved_validation

    config, sources = saved_validation(path, files, form_of=Conversations.of)
    loaded = load_run(path)
    length = config.data.sequence_length
    held_out = HeldOut(sources, loaded.tokenizer, length, Conversations.of(config))
    conversations = (parse_conversation(orjson.loads(document.text)) for document in held_out.documents())
    turns = chosen_turns(conversations, examples)
    if not turns:
        raise UserError(f"{path}: the validation conversations have no answer to a user; give --files")
    sampling = Sampling(max_new_tokens=max(length // 4, 1), temperature=0.0)
    options = ReplyOptions(candidates=1, threshold=1.0, sampling=sampling)
    speaker = Speaker.of(loaded, toolset=toolset, options=options)
    with Progress("asking", total=turns, unit="turns") as shown:
        return summary(list(outcomes(speaker, toolset, turns, on_progress=shown.advance)))


def chosen_turns(conversations: Iterable[Conversation], limit: int | None) -> list[Turn]:
    """At most `limit` turns of each kind, kind by kind, in a fixed random order."""
    found = [turn for conversation in conversations for turn in turns_of(conversation)]
    shuffled = [found[place] for place in permutation(len(found), 0)]
    return [turn for kind in KINDS for turn in [turn for turn in shuffled if turn.kind == kind][:limit]]


def outcomes(
    speaker: Speaker,
    toolset: Toolset,
    turns: Iterable[Turn],
    *,
    on_progress: Callable[[int], object] = lambda turns: None,
) -> Iterator[Outcome]:
    """What the speaker, which has this toolset, does with each turn."""
    for turn, wanted in [(turn, _wanted(turn, toolset)) for turn in turns]:  # all references first: one may be an error
        yield _outcome(turn.kind, speaker.reply(turn.context), wanted)
        on_progress(1)


def _wanted(turn: Turn, toolset: Toolset) -> list[Result]:
    """The results that the answer rests on; none if it needs no call."""
    asked: Counter[str] = Counter()
    results: list[Result] = []
    for query in turn.calls:
        results += toolset(query, again=asked[query])
        asked[query] += 1
    knowledge = turn.answer.knowledge
    wanted = [each for each in results if (each.source in knowledge if knowledge else each.source is None)]
    if turn.calls and not wanted:
        raise UserError(
            f"the tools do not find {', '.join(knowledge) or 'a result'} for {turn.calls[-1]!r}: give the tools and "
            "the corpus with which the held-out conversations were made"
        )
    return wanted


def _outcome(kind: Kind, reply: Reply, wanted: Sequence[Result]) -> Outcome:
    called = any(step.to == "TS" for step in reply.steps)
    found = any(result in wanted for step in reply.steps for result in step.results)
    cited = kind == "result" or any(result.source in reply.sources for result in wanted)
    used = found and cited and _uses(reply.text, wanted)
    return Outcome(kind, called, found, used, unaided=_uses(reply.candidates[0].text, wanted))


def _uses(answer: str, wanted: Sequence[Result]) -> bool:
    """Whether the answer has a result as a whole word, or `QUOTED_WORDS` words of a passage (all of a shorter one)."""
    said = answer.split()
    for result in wanted:
        if result.source is None:
            if re.search(rf"(?<![\w.-]){re.escape(result.text)}(?!\w|\.\d)", answer):
                return True
            continue
        words = result.text.split()
        count = min(QUOTED_WORDS, len(words))
        quotes = {tuple(words[place : place + count]) for place in range(len(words) - count + 1)}
        if any(tuple(said[place : place + count]) in quotes for place in range(len(said) - count + 1)):
            return True
    return False


def summary(found: Sequence[Outcome]) -> dict[str, Any]:
    """By kind of turn: the number, and each share with its 95% interval."""
    kinds = {kind: [each for each in found if each.kind == kind] for kind in KINDS}
    return {kind: _shares(those) for kind, those in kinds.items() if those}


def _shares(found: Sequence[Outcome]) -> dict[str, Any]:
    names = ("called",) if found[0].kind == "no call" else ("called", "found", "used", "unaided")
    counts = {name: sum(getattr(each, name) for each in found) for name in names}
    shares = {
        name: {"share": count / len(found), "interval": wilson(count, len(found))} for name, count in counts.items()
    }
    return {"turns": len(found), **shares}


def wilson(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z2 = 1.959964**2
    half = math.sqrt(z2 * (count * (total - count) / total + z2 / 4))
    low, high = ((count + z2 / 2 + sign * half) / (total + z2) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text; none if it is empty."""
    if not report:
        return
    heads = {"called": "call made", "found": "call right", "used": "answer uses it", "unaided": "without tools"}
    yield f"{'tool use':10}{'turns':>7}" + "".join(f"{head:>24}" for head in heads.values())
    for kind, part in report.items():
        cells = (part.get(name) for name in heads)
        texts = ("-" if cell is None else _cell(cell["share"], *cell["interval"]) for cell in cells)
        yield f"{kind:10}{part['turns']:7,}" + "".join(f"{text:>24}" for text in texts)


def _cell(share: float, low: float, high: float) -> str:
    return f"{share:.3f} ({low:.3f} to {high:.3f})"
