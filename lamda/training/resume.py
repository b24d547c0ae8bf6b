"""Where a run begins: its newest valid checkpoint, a given one, or from scratch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.config.schema import Config
from lamda.config.stages import FREE, RATE_KEYS, Stage, plan_stages, stage_at
from lamda.data.corpus import changed_files, differences
from lamda.distributed import World, on_main
from lamda.durable import Progress
from lamda.storage import commit, manifest
from lamda.storage.mirror import Mirror, require_empty, restore_newer
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training.anomalies import set_aside_rolled_back
from lamda.training.changes import report_settings, require_same_computation, was_and_is

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to continue from (or None), and its state."""

    path: Path | None
    state: RunState

    def check_data(self, current: dict[str, Any], *, accepted: Sequence[str] = ()) -> RunState:
        """The state to begin with, with `current` as its fingerprint. Raises UserError if the samples would differ.

        accepted: names of changed files whose text is accepted as unchanged.
        """
        saved, state = self.state.fingerprint, replace(self.state, fingerprint=current)
        if self.path is None or self.state.takes_any_text:
            return state
        saved_format, current_format = saved.get("format"), current.get("format")
        if saved_format != current_format:
            raise UserError(
                f"{self.path}: its samples are in the order of another version (format {saved_format}; this one has "
                f"{current_format}). Resume with the version that wrote it, or start another run.dir from the weights "
                "alone (model.weights)"
            )
        changed = changed_files(saved, current)
        names = [name for name in differences(saved, current) if name != "contents"]
        changes = [f"{name} {was_and_is(saved.get(name), current.get(name))}" for name in names]
        if changes:
            raise UserError(
                f"{self.path}: the data differs from the checkpoint: {'; '.join(changes)}. Restore these settings, or "
                "continue with other text in another run (`lamda branch --fresh-data`)"
            )
        if rejected := [name for name in changed if name not in accepted]:
            raise UserError(
                f"{self.path}: the text has changed since it was written, in {len(rejected)} files of the same name "
                f"and size: {', '.join(rejected[:10])}. Put the former files back, or start another run.dir from the "
                "weights alone (model.weights). Where a file is the same and only its server's tag is new, name it in "
                "data.accept_changed"
            )
        if "contents" not in saved:
            log.info("%s has no hashes of its text files: whether they have changed is not verified", self.path)
        if changed:  # the digests of the documents at the cursors no longer match
            log.info("treated as unchanged because of data.accept_changed: %s", ", ".join(changed))
            state = replace(state, order=tuple(each.without_digests() for each in state.order))
        return state


def find_resume_point(
    config: Config, directory: RunDirectory, world: World, *, framework: str, progress: Progress = lambda: None
) -> ResumePoint:
    """The checkpoint that `checkpoint.resume` asks for, verified; every rank calls it.

    framework: name of the framework that resumes. progress: called while files are hashed. Raises UserError and
    UnreadableError.
    """
    resume_mode = config.checkpoint.resume
    mirror = None if config.checkpoint.mirror is None else Mirror(config.checkpoint.mirror, directory.path)
    path = None
    if resume_mode in ("auto", "required"):
        on_main(world, lambda: set_aside_rolled_back(directory))
        path = _newest(directory, mirror, world, progress)
    elif mirror is not None:
        on_main(world, lambda: require_empty(mirror, directory))
    on_main(world, lambda: _check_resume_mode(config, directory))
    if resume_mode == "never":
        return ResumePoint(None, RunState())
    if resume_mode not in ("auto", "required"):
        path = Path(resume_mode)
        problem = commit.verify(path, world=world, progress=progress)
        if problem is not None:
            raise UserError(f"checkpoint.resume {resume_mode}: {problem}")
        on_main(world, lambda: _inherit_windows(path, directory))
    if path is None:
        on_main(world, lambda: commit.require_none(directory.checkpoints, noted=directory.noted_checkpoint()))
        return ResumePoint(None, RunState())

    def check() -> RunState:
        state = manifest.read_state(path)
        now, before = require_resumable(config, path, state, framework=framework)
        report_settings(now, path, before=before, step=state.step + 1)
        if path.parent == directory.checkpoints and not directory.metrics.exists():
            log.warning("%s is gone: the rows up to step %d are missing", directory.metrics, state.step)
        return state

    return ResumePoint(path, _with_noted_windows(on_main(world, check), directory))


def require_resumable(config: Config, path: Path, state: RunState, *, framework: str) -> tuple[Config, Config | None]:
    """The configuration of the stage of a checkpoint with this state, now and, if the run had stages, before.

    Raises UserError if the configuration cannot continue from it.
    """
    _check_manifest(config, path, framework=framework)
    saved, stages = settings_of(path), plan_stages(config)
    earlier = () if saved is None else plan_stages(saved)
    _check_stages(stages, earlier, state, path)
    now, before = stages[state.stage - 1].config, None
    if len(earlier) > 1:  # a stage's settings are not those at the head of the file
        before = stage_at(earlier, state.step - 1).config
    require_same_computation(now, path, before=before)
    return now, before


def _check_stages(stages: Sequence[Stage], before: Sequence[Stage], state: RunState, path: Path) -> None:
    """Report changed stages to come. Raises UserError if one that has begun changed. before: the checkpoint's."""
    if state.takes_any_text or (len(before) <= 1 and len(stages) == state.stage == 1):
        return
    problems = []
    for number in range(1, state.stage + 1):
        known, now = ((each[number - 1] if number <= len(each) else None) for each in (before, stages))
        if now is None:
            problems.append(f"stage {known.name if known else number} is missing")
            continue
        changes = [] if known is None else _stage_changes(known, now, is_over=number < state.stage)
        if number == state.stage and now.last < state.step:
            changes.append(f"would have ended at step {now.last}; raise its end, or add a later stage")
        problems += [f"stage {now.name or number}: {change}" for change in changes]
    if problems:
        raise UserError(
            f"{path}: stages that the run has begun cannot change: {'; '.join(problems)}. Restore them; to change "
            "something from here on, end the present stage here and add one"
        )
    for stage in stages[state.stage :]:
        known = before[stage.number - 1] if stage.number <= len(before) else None
        changes = ["is new"] if known is None else _stage_changes(known, stage, is_over=True)
        if changes:
            log.warning("stage %s, which is to come: %s", stage.name, "; ".join(changes))
    begun = [stage for stage in stages if stage.first < state.step]
    rows = sum((min(stage.last, state.step) - stage.first) * stage.config.train.global_batch_size for stage in begun)
    if rows != state.samples:  # it had another batch before it had stages
        text = "%s: the run has read %d rows, by its stages %d: an `until` in tokens ends as much off; give steps"
        log.warning(text, path, state.samples, rows)


_OF_THE_DATA = ("data.corpus", "data.files", "data.shuffle", "data.packing", "data.document_mask")
"""Keys of a stage that are compared by the fingerprint, or reported."""


def _stage_changes(before: Stage, now: Stage, *, is_over: bool) -> list[str]:
    """Differences in what a stage does. If it is not over, its end and its rates may change."""
    old, new = before.settings(), now.settings()
    may_change = () if is_over else tuple(key for key in new if key.removeprefix("train.") in RATE_KEYS)
    ignored = (*FREE, *may_change, *(() if is_over else _OF_THE_DATA))
    changes = [f"{key} {was_and_is(old[key], new[key])}" for key in new if key not in ignored and old[key] != new[key]]
    if is_over and before.last != now.last:
        changes.append(f"its last step {was_and_is(before.last, now.last)}")
    return changes


def settings_of(path: Path) -> Config | None:
    """The configuration of a checkpoint; None where this version rejects it."""
    try:
        return load_config(["--config", str(manifest.named(path, "config.yaml"))])
    except UserError:
        return None


def backend_change(path: Path, settings: Config | None, *, attention: str | None) -> list[str]:
    """A warning if the checkpoint was trained with another attention backend: rounding differs from here on.

    settings: the checkpoint's. attention: the backend now, None where the framework has no choice.
    """
    named = None if settings is None else settings.model.attention  # early manifests name no backend
    before = manifest.read(path).get("attention", named)
    if attention is None or before in (None, "auto", attention):
        return []
    return [
        f"attention: {attention}, but {path} was trained with {before}, which rounds differently; "
        f"model.attention {before} continues as before"
    ]


def _newest(directory: RunDirectory, mirror: Mirror | None, world: World, progress: Progress) -> Path | None:
    """The newest valid checkpoint, of the mirror if it has a newer one; every rank calls it."""
    find = partial(commit.find_valid, directory.checkpoints, world=world, progress=progress)
    if mirror is None:
        return find()
    path, damage = None, None
    try:
        path = find()
    except UserError as error:
        damage = error
    is_lost = damage is not None
    if on_main(world, lambda: restore_newer(mirror, directory, all_damaged=is_lost, progress=progress)):
        return find()
    if damage is not None:
        raise damage
    return path


def _check_resume_mode(config: Config, directory: RunDirectory) -> None:
    resume_mode, checkpoints = config.checkpoint.resume, manifest.complete(directory.checkpoints)
    if resume_mode == "never" and directory.holds_a_run:
        raise UserError(f"checkpoint.resume never: {directory.path} already holds a run; choose another run.dir")
    if resume_mode == "required" and not checkpoints:
        raise UserError(f"checkpoint.resume required: {directory.checkpoints} holds no complete checkpoint")
    if resume_mode in ("auto", "required", "never"):
        return
    if not Path(resume_mode).is_dir():
        raise UserError(f"checkpoint.resume {resume_mode}: no such checkpoint (nor one of auto, required, never)")
    if inside := manifest.complete(RunDirectory(Path(resume_mode)).checkpoints):
        raise UserError(f"checkpoint.resume {resume_mode}: is a run; name one of its checkpoints, such as {inside[-1]}")
    step = manifest.step_in(Path(resume_mode))
    newer = [path.name for path in checkpoints if step is not None and manifest.step_of(path) > step]
    if newer:
        raise UserError(
            f"checkpoint.resume {resume_mode}: {directory.path} holds newer checkpoints ({newer[-1]}), which resuming "
            "from this one would overwrite; choose another run.dir"
        )


def _check_manifest(config: Config, path: Path, *, framework: str) -> None:
    """Raise UserError if framework, model, optimizer or adapters are not those of the configuration."""
    saved, train = manifest.read(path), config.train
    instead = f"start from the weights alone: model.weights {path / 'model.safetensors'} and another run.dir"
    if (saved_framework := manifest.framework_of(saved)) != framework:
        raise UserError(
            f"{path} was written by {saved_framework}; {framework} cannot resume from it. Continue with "
            f"{saved_framework}, or {instead}"
        )
    model = saved["model"]
    different = {key: value for key, value in config.model.dimensions.items() if model.get(key) != value}
    if different:
        problems = [f"{key} is {model.get(key)}, the configuration says {value}" for key, value in different.items()]
        raise UserError(
            f"{path} is a checkpoint of another model: {'; '.join(problems)}. Fix model.*, or choose another run.dir"
        )
    rank = saved.get("lora_rank", 0)
    adapters = f"adapters of rank {rank}" if rank else "no adapters"
    optimizer = saved.get("optimizer", "adamw")  # early manifests name neither
    for held, key, saved_value, value in (
        (f"the state of {optimizer}", "optimizer", optimizer, train.optimizer),
        (adapters, "lora_rank", rank, train.lora_rank),
    ):
        if saved_value != value:
            raise UserError(
                f"{path} holds {held}, which train.{key} {value} cannot resume from. Set train.{key} {saved_value}, "
                f"or {instead}"
            )


def _with_noted_windows(state: RunState, directory: RunDirectory) -> RunState:
    """The state with the sample ranges to skip because of rollbacks since this checkpoint was written."""
    skipped = (*state.skipped, *(window for window in directory.skipped() if window not in state.skipped))
    state = state.with_parked(directory.parked(state.skipped))
    return replace(state, skipped=skipped, rollbacks=max(state.rollbacks, directory.rollbacks))


def _inherit_windows(path: Path, directory: RunDirectory) -> None:
    """Skip the sample ranges that the run of checkpoint `path` has recorded since."""
    folder = path.resolve().parent
    if folder.name == directory.checkpoints.name and folder.parent != directory.path.resolve():
        directory.inherit_skipped(RunDirectory(folder.parent))
