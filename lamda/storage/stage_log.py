"""Where the text of each stage of a run began, one line each in stages.jsonl; `lamda trace` looks it up."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from lamda.best_effort import BestEffort
from lamda.config.errors import UserError
from lamda.data.order import BEGINNING, DataStart
from lamda.durable import read_regular
from lamda.storage.reading import reading
from lamda.storage.state import RunState


def note_stage(path: Path, state: RunState) -> None:
    """Append the stage that the run enters; it may enter it again after a stop or a rollback."""
    entry = {"stage": state.stage, "step": state.step, "start": asdict(state.start)}
    with BestEffort(f"{path} cannot be written"), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def stage_start(path: Path, number: int) -> DataStart:
    """Where the text of a stage began. Raises UserError if that is not recorded."""
    if number == 1:
        return BEGINNING
    try:
        with reading(path):
            entries = [json.loads(line) for line in read_regular(path).splitlines()]
        return next(DataStart.from_json(each["start"]) for each in reversed(entries) if each["stage"] == number)
    except (FileNotFoundError, StopIteration, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: does not say where the text of stage {number} began") from error
