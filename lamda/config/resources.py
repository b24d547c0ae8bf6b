"""Search for configs, dataset cards and DeepSpeed files: the working directory, then the package's copies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lamda.config.errors import UserError, nearest

if TYPE_CHECKING:
    from jinja2 import Environment

_PACKAGE = Path(__file__).resolve().parents[1]


def find(path: str, *, among: str | None = None) -> Path:
    """The file called `path`: absolute, from the working directory, or among the package's copies.

    among: a glob of known files (`configs/*.yaml`). A path without a suffix that is no file is a name in it: `tiny` for
    `configs/tiny.yaml`, `finetune/tiny` for `configs/finetune/tiny.yaml`.
    Raises `UserError` with the places searched, the known files and the nearest name.
    """
    roots = [Path(), _PACKAGE / "_resources"]  # the working directory, and a wheel's copies
    if (_PACKAGE.parent / "pyproject.toml").is_file():  # the repository of an editable install
        roots.append(_PACKAGE.parent)
    is_name = not Path(path).suffix and not Path(path).is_absolute()
    names = [path, among.replace("*", path)] if among and is_name else [path]
    candidates = [root / name for name in names for root in roots]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    tried = list(dict.fromkeys(candidate.absolute() for candidate in candidates))
    known = sorted({str(hit.relative_to(root)) for root in roots for hit in root.glob(among)}) if among else []
    there_are = f"; there are {', '.join(known)}" if known else ""
    there_are += nearest(Path(path).stem, {Path(name).stem for name in known})
    raise UserError(f"there is no file {path!r}: looked for {', '.join(map(str, tried))}{there_are}")


def card_path(name: str) -> Path:
    """The card `data/<name>.yaml`, or the file `name` if it ends in `.yaml`. Raises `UserError` with known cards."""
    return find(name if name.endswith(".yaml") else f"data/{name}.yaml", among="data/*.yaml")


def templates(folder: str, *, is_html: bool = False) -> Environment:
    """The templates in a folder of the package. is_html: values are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_PACKAGE / folder),
        autoescape=is_html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
