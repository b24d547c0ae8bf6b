"""Short runs with a user's configuration, in a folder beside its run directory, by which a machine is tested."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lamda.config.errors import UserError
from lamda.config.loading import NO_STAGES
from lamda.config.schema import Config

HELD_OUT = "held-out.txt"


def make_folder(config: Config, *, purpose: str) -> Path:
    """A new folder for the runs, with text to evaluate on. Raises UserError."""
    run = Path(config.run.dir)
    folder = None
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{run.name}-{purpose}-", dir=run.parent))
        (folder / HELD_OUT).write_text("A line to evaluate on.\n", "utf-8")
        return folder
    except OSError as error:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{run.parent}: cannot be written to ({error.strerror}); choose another run.dir") from error


def short_run(folder: Path, *, steps: int, every: int) -> dict[str, object]:
    """Settings of a run of `steps` steps with a checkpoint `every` steps, and no long work at its end."""
    return {
        "train.steps": steps,
        "train.tokens": "null",
        "checkpoint.every": every,
        "checkpoint.keep": steps,
        "checkpoint.resume": "auto",
        "eval.every": "null",
        "data.eval_files": folder / HELD_OUT,  # the evaluation of the last step would read all of the corpus's
        "wandb.mode": "disabled",
    }


def existing_tokenizer(config: Config) -> str | None:
    """The tokenizer of the configuration or of its run; None if the first short run must train one."""
    existing = Path(config.run.dir) / "tokenizer.model"
    return config.tokenizer.path or (str(existing) if existing.is_file() else None)


def flags_of(settings: Mapping[str, object]) -> list[str]:
    """Settings of a short run as command-line flags; it is too short for stages."""
    return [NO_STAGES, *(f"--{key}={value}" for key, value in settings.items())]


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)
