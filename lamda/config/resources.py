"""Where configs, corpus cards and DeepSpeed files are found: the working directory, then the package's copies."""

from pathlib import Path

from lamda.config.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def _roots() -> list[Path]:
    """The working directory, a wheel's copies, and the repository of an editable install."""
    repository = _PACKAGE.parent
    is_checkout = (repository / "pyproject.toml").is_file()
    return [Path(), _PACKAGE / "_resources", *([repository] if is_checkout else [])]


def find(path: str, *, among: str | None = None) -> Path:
    """The file called `path`: absolute, from the working directory, or among the package's copies.

    `among` is a glob of the same search (`configs/*.yaml`) whose hits the error lists.
    Raises `UserError`, naming every place that was tried.
    """
    roots = _roots()
    tried = list(dict.fromkeys((root / path).absolute() for root in roots))
    for candidate in (root / path for root in roots):
        if candidate.is_file():
            return candidate
    known = sorted({str(hit.relative_to(root)) for root in roots for hit in root.glob(among)}) if among else []
    there_are = f"; there are {', '.join(known)}" if known else ""
    raise UserError(f"there is no file {path!r}: looked for {', '.join(map(str, tried))}{there_are}")


def card_path(name: str) -> Path:
    """The corpus card called `name` (`data/<name>.yaml`), or the file at `name` where that ends in `.yaml`.

    Raises `UserError`, naming the cards that exist.
    """
    return find(name if name.endswith(".yaml") else f"data/{name}.yaml", among="data/*.yaml")
