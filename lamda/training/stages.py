"""From one stage of a run to the next: where the text of the next one begins.

A source that several stages read continues where it was, so that nothing comes twice before its epoch ends; a new
source begins at its beginning. Stages with the same text continue as if they were one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from lamda.config.stages import Stage
from lamda.data.order import DataStart, past_skipped
from lamda.data.windows import SourceOrder
from lamda.storage.state import ParkedSource, RunState
from lamda.training.inputs import Inputs


@dataclass
class StagedInputs:
    """The text of each stage, opened once; stages with the same text share it. open: every rank calls it."""

    stages: tuple[Stage, ...]
    open: Callable[[Stage], Inputs]
    _opened: dict[int, Inputs] = field(default_factory=dict)

    def of(self, number: int) -> Inputs:
        """The inputs of a stage. Raises UserError."""
        stage = self.stages[number - 1]
        if number not in self._opened:
            same = (each for each in self._opened.values() if each.config.data == stage.config.data)
            shared = next(same, None)
            self._opened[number] = self.open(stage) if shared is None else replace(shared, config=stage.config)
        return self._opened[number]

    def enter(self, state: RunState) -> RunState:
        """The state in the stage of the next step."""
        while state.stage < len(self.stages) and state.step >= self.stages[state.stage - 1].last:
            after = self.of(state.stage + 1)
            state = entered(state, self.of(state.stage), after)
        return state

    def rolled_back(self, target: RunState, current: RunState) -> tuple[tuple[int, int], dict[str, dict[str, Any]]]:
        """What a run that returns from `current` to `target` skips: a range of samples, and rows of later sources."""
        if target.start == current.start:
            return (target.consumed, current.consumed), {}
        seen, inputs = _parked(current, self.of(current.stage)), self.of(target.stage)
        mixture = replace(inputs.corpus, start=target.start).mixture
        floors = [seen[name].rows for name in inputs.identities]
        low, high = target.consumed, target.consumed + 1
        while any(rows < floor for rows, floor in zip(mixture.rows_before(high), floors, strict=True)):
            low, high = high, high + 2 * (high - target.consumed)
        while high - low > 1:  # the first sample before which every source has been read as far as it was
            middle = (low + high) // 2
            is_past = all(rows >= floor for rows, floor in zip(mixture.rows_before(middle), floors, strict=True))
            low, high = (low, middle) if is_past else (middle, high)
        later = {name: asdict(source) for name, source in seen.items() if name not in inputs.identities}
        return (target.consumed, high), later


def entered(state: RunState, before: Inputs, after: Inputs) -> RunState:
    """The state at the beginning of the next stage."""
    state = replace(state, stage=state.stage + 1, consumed=past_skipped(state.consumed, state.skipped))
    if before.fingerprint == after.fingerprint:
        return state
    parked = _parked(state, before)
    free = count(max((each.number for each in parked.values()), default=-1) + 1)
    known = parked.keys() & after.identities
    sources = [parked.pop(name) if name in known else ParkedSource(number=next(free)) for name in after.identities]
    start = DataStart(state.consumed, tuple(each.rows for each in sources), tuple(each.number for each in sources))
    order = tuple(each.order for each in sources)
    return replace(state, start=start, order=order, fingerprint=after.fingerprint, parked=parked)


def _parked(state: RunState, inputs: Inputs) -> dict[str, ParkedSource]:
    """All sources that the run has read so far."""
    corpus = replace(inputs.corpus, start=state.start)
    rows = corpus.mixture.rows_before(state.consumed).tolist()
    orders = state.order or [SourceOrder()] * len(rows)
    sources = (
        ParkedSource(used, state.start.number(source), order.without(used))
        for source, (used, order) in enumerate(zip(rows, orders, strict=True))
    )
    return {**state.parked, **dict(zip(inputs.identities, sources, strict=True))}
