"""A folder that is written atomically and never overwrites another."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamda.config.errors import UserError
from lamda.durable import sync_folder
from lamda.storage.commit import make_fresh, seal, sync_and_describe

UNSEALED = ("README.md",)
"""Files that users may edit afterwards."""


@contextmanager
def new_folder(to: Path, about: dict[str, object]) -> Iterator[Path]:
    """A temporary folder beside `to`, which becomes `to` at the end with a manifest of its files and `about`.

    Raises UserError if `to` exists and is not empty, or cannot be written.
    """
    to = to.absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to}: something is there already and is not overwritten; name a new folder")
    temporary = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    try:
        make_fresh(temporary)
        yield temporary
        described = {path.name: sync_and_describe(path) for path in sorted(temporary.iterdir())}
        files = {name: entry for name, entry in described.items() if name not in UNSEALED}
        seal(temporary, {**about, "files": files})
        temporary.rename(to)
        sync_folder(to.parent)
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror or error}); nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
