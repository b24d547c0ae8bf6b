"""What differs between a checkpoint and the start that resumes from it, one line each.

Settings that change what the model computes are rejected unless `checkpoint.accept_changed` names them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lamda.config import ds_config
from lamda.config.errors import UserError
from lamda.config.loading import DEPRECATED
from lamda.config.schema import COMPUTATION, Config
from lamda.durable import read_regular
from lamda.storage import manifest
from lamda.storage.reading import reading

log = logging.getLogger(__name__)

OF_EACH_START = {
    "run.dir", "model.preset", "model.weights", "model.attention", "tokenizer.path", "data.accept_changed",
    "checkpoint.resume", "checkpoint.accept_changed", "stages",
}  # fmt: skip
"""Keys that say nothing about the run, or that other checks report."""
HARMLESS = {f"train.{key}" for key in ("steps", "tokens", "micro_batch_size", "recompute", "compile", "profile")}
"""Keys of `train` that are not worth a warning."""
NEW_RATES = "rates of query, norms and bias tables, and no decay of the embedding (CHANGELOG.md)"


def require_same_computation(config: Config, path: Path, *, before: Config | None = None) -> None:
    """Raise UserError if the model would compute something else than in checkpoint `path`, unless that is accepted.

    before: the checkpoint's settings, where its stage has others than its file.
    """
    saved, current = _settings_in(path, before), _flat(config.model_dump(mode="json"))
    for settings in (saved, current):  # rows of whole documents have the mask, too
        if settings.get("data.packing") == "whole":
            settings["data.document_mask"] = True
    known = {name: saved[name] for name in COMPUTATION if name in saved}
    if start := read_start(path):
        known["bf16"] = ds_config.is_bf16(start["deepspeed"])
        current["bf16"] = ds_config.is_bf16(ds_config.read(config))
    changed = [
        name
        for name, value in known.items()
        if value != current[name] and name not in (config.checkpoint.accept_changed or ())
    ]
    if changed:
        lines = [f"{name} {_arrow(known[name], current[name])}" for name in changed]
        raise UserError(
            f"{path}: the model would compute something else: {'; '.join(lines)}. Restore these settings, or accept "
            f"the change by name: --checkpoint.accept_changed {','.join(changed)}"
        )


def report_settings(config: Config, path: Path, *, before: Config | None = None, step: int) -> None:
    """Log one line for each setting that differs from those of checkpoint `path`; `step` is the next one.

    before: as for `require_same_computation`. A warning if training depends on it. The data's own settings are in the
    fingerprint (`ResumePoint.check_data`).
    """
    saved = _settings_in(path, before)
    for key, now in _flat(config.model_dump(mode="json")).items():
        if key not in saved or key in OF_EACH_START or saved[key] == now:
            continue
        is_of_training = key.startswith("train.") or key == "data.document_mask"
        report = log.warning if is_of_training and key not in HARMLESS else log.info
        report("%s %s from step %d on", key, _arrow(saved[key], now), step)
    if "train.norm_lr_scale" not in saved:
        log.warning("from step %d on: %s", step, NEW_RATES)


def report_start(record: Mapping[str, Any], path: Path, *, step: int) -> None:
    """Warn in one line of each part of this start (`describe_start`) that is not that of checkpoint `path`."""
    before = read_start(path)
    for name, (old, new) in (_differences(before, record) if before else {}).items():
        log.warning("%s %s from step %d on", name, _arrow(old, new), step)


def read_start(path: Path) -> dict[str, Any] | None:
    """The record of the start that wrote a checkpoint; None in checkpoints of earlier versions."""
    if manifest.START not in manifest.read(path)["files"]:
        return None
    return _parsed(path / manifest.START, json.loads)


def was_and_is(before: Any, now: Any) -> str:
    """`was A, is B`; of long values only the part that differs."""
    if isinstance(before, list) and isinstance(now, list):
        removed, added = [each for each in before if each not in now], [each for each in now if each not in before]
        if removed or added:
            parts = [f"{verb} {_listed(values)}" for verb, values in (("lost", removed), ("gained", added)) if values]
            return " and ".join(parts)
    return "was {}, is {}".format(*_where_they_differ(before, now))


def _arrow(before: Any, now: Any) -> str:
    return "{} -> {}".format(*_where_they_differ(before, now))


def _where_they_differ(before: Any, now: Any) -> Iterator[str]:
    texts = str(before), str(now)
    same = next((place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), 0)
    return (_around(text, same) for text in texts)


def _listed(values: list[Any]) -> str:
    shown = ", ".join(_around(str(each), 0) for each in values[:3])
    return shown + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def _around(text: str, place: int) -> str:
    """A text, or the part of it around `place`."""
    if len(text) <= 60:
        return text
    start = max(0, min(place - 20, len(text) - 57))
    return "..." * (start > 0) + text[start : start + 57] + "..." * (start + 57 < len(text))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Old and new value of each part of two records that differs, by its name in words."""
    names = {"lamda": "lamda", "python": "Python", "cuda": "CUDA", "driver": "NVIDIA driver", "ranks": "ranks"}
    texts = [
        {
            **{name: record.get(key) for key, name in names.items()},
            "commit": _commit(record),
            "machines": "; ".join(f"{count} x ({kind})" for kind, count in record.get("hosts", {}).items()),
            **record.get("packages", {}),
            **{f"DeepSpeed's {key}": value for key, value in _flat(record.get("deepspeed", {})).items()},
        }
        for record in (before, now)
    ]
    if texts[0]["commit"] == texts[1]["commit"]:  # the same, or unknown: an edit shows in the files alone
        for text, record in zip(texts, (before, now), strict=True):
            text["lamda's source"] = record.get("source")
    old, new = texts
    return {
        name: (old.get(name), new.get(name)) for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)
    }


def _commit(record: Mapping[str, Any]) -> str | None:
    git = record.get("git")
    return git and f"{git['commit'][:12]}{' with changes' if git['dirty'] else ''}"


def _settings_in(path: Path, known: Config | None) -> dict[str, Any]:
    """The settings of a checkpoint by their present names; from its file, if they are not `known`."""
    if known is not None:
        return _flat(known.model_dump(mode="json"))
    flat = _flat(_parsed(path / "config.yaml", yaml.safe_load))
    return {DEPRECATED.get(key, key): value for key, value in flat.items()}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _parsed(file: Path, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    """The mapping in a file that the manifest lists. Raises UserError and UnreadableError."""
    try:
        with reading(file):
            content = parse(read_regular(manifest.named(file.parent, file.name)))
        if not isinstance(content, dict):
            raise ValueError("holds no mapping")
    except (FileNotFoundError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    return content
