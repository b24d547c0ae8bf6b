"""The stages of a run: stretches of steps, each with a configuration of its own.

A stage changes keys at its beginning, and they stay so until a later stage changes them again. All of it follows from
the configuration and the number of a step, so that any resume, on any number of ranks, is in the right stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from lamda.config.errors import UserError, nearest
from lamda.config.schema import Config
from lamda.config.settings import in_plain_words, item_name
from lamda.config.spans import StageConfig

RATE_KEYS = ("lr", "schedule", "warmup_steps", "decay_fraction", "min_lr_ratio")
"""Keys of `train` that begin a new schedule."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "data": (
        "corpus", "files", "sequence_length", "shuffle", "packing", "document_mask", "cache_dir",
        "max_bad_line_fraction", "drop",
    ),
    "train": (*RATE_KEYS, "global_batch_size", "micro_batch_size", "recompute"),
}  # fmt: skip
"""Keys that a stage may change."""
FREE = ("data.cache_dir", "data.max_bad_line_fraction", "train.micro_batch_size", "train.recompute")
"""Those of them that change neither the samples nor, but for rounding, the weights."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run, or the whole of a run without stages.

    number: from 1. config: the keys that hold in it. first: steps before it. last: its last step. tokens: of the rows
    before it. schedule: first and last step of its learning rate's schedule, which may span several stages; None
    without stages.
    """

    number: int
    name: str
    config: Config
    first: int
    last: int
    tokens: int
    schedule: tuple[int, int] | None = None

    @property
    def rows(self) -> int:
        """Rows of all its steps."""
        return (self.last - self.first) * self.config.train.global_batch_size

    def settings(self) -> dict[str, Any]:
        """The values of the keys that a stage may change, by dotted name."""
        sections = {"data": self.config.data, "train": self.config.train}
        return {f"{name}.{key}": getattr(sections[name], key) for name, keys in KEYS.items() for key in keys}


def with_rows_of(config: Config, stage: Config) -> Config:
    """A run's configuration with the rows of one of its stages, for its held-out text, the same in all stages."""
    rows = {key: getattr(stage.data, key) for key in ("sequence_length", "packing", "document_mask")}
    return config.model_copy(update={"data": config.data.model_copy(update=rows), "stages": ()})


def stage_lines(stages: Sequence[Stage]) -> Iterator[str]:
    """The stages for a person: steps, tokens, and what each changes."""
    before: dict[str, Any] = {}
    for stage in stages:
        settings = stage.settings()
        changes = [f"{key} {settings[key]}" for key in settings if before and settings[key] != before[key]]
        tokens = stage.rows * stage.config.data.sequence_length
        span = f"steps {stage.first + 1:,} to {stage.last:,}, {tokens:,} tokens"
        yield f"stage {stage.name}: {span}" + (f"; {', '.join(changes)}" if changes else "")
        before = settings


class StageProblem(NamedTuple):
    """A mistake in a stage. item: of the list, from 0. key: `until`, `train.lr`, ..."""

    item: int
    key: str
    text: str


def plan_stages(config: Config) -> tuple[Stage, ...]:
    """The stages of a run in order. Raises UserError, which a configuration from `load_config` does not."""
    if not config.stages:
        return (Stage(1, "", config, 0, config.steps, 0),)
    if problems := stage_problems(config):
        raise UserError("\n".join(f"{item_name('stages', index, key)}: {text}" for index, key, text in problems))
    configs, spans = list(_configs(config)), config.spans
    begins = [index for index, stage in enumerate(config.stages) if not index or {*RATE_KEYS} & stage.train.keys()]
    stages = []
    for index, (stage, own, span) in enumerate(zip(config.stages, configs, spans, strict=True)):
        begin = max(each for each in begins if each <= index)
        end = min((each for each in begins if each > index), default=len(spans)) - 1
        schedule = spans[begin].first, spans[end].last
        stages.append(Stage(index + 1, _name(index, stage), own, *span, schedule))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the step after `step`; the last one at the end of the run."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def stage_problems(config: Config) -> list[StageProblem]:
    """What is wrong with the stages."""
    problems = [*_wrong_keys(config.stages), *_wrong_ends(config.stages)]
    if problems:
        return problems
    try:
        list(_configs(config))
    except _WrongValueError as error:
        return [error.problem]
    spans = config.spans
    return [
        StageProblem(index, "until", f"ends at step {span.last}, and the stage begins after step {span.first}")
        for index, span in enumerate(spans)
        if span.last <= span.first
    ]


def _wrong_keys(stages: tuple[StageConfig, ...]) -> Iterator[StageProblem]:
    for index, stage in enumerate(stages):
        for section, values in (("data", stage.data), ("train", stage.train)):
            for key in values:
                name = f"{section}.{key}"
                if index == 0:
                    yield StageProblem(
                        index, name, f"the first stage has the run's own keys; set it in the section {section}"
                    )
                elif key not in KEYS[section]:
                    known = [f"{each}.{one}" for each, keys in KEYS.items() for one in keys]
                    yield StageProblem(
                        index, name, f"cannot change in a stage{nearest(name, known)}; these can: {', '.join(known)}"
                    )


def _wrong_ends(stages: tuple[StageConfig, ...]) -> Iterator[StageProblem]:
    for index, stage in enumerate(stages):
        is_last = index == len(stages) - 1
        if is_last and stage.until is not None:
            yield StageProblem(
                index, "until", "the last stage ends with the run, at train.steps or train.tokens; remove it"
            )
        elif not is_last and stage.until is None:
            yield StageProblem(index, "until", "is missing; write `until: 8000 steps` or `until: 4e9 tokens`")
    names = [*map(_name, range(len(stages)), stages)]
    for index, name in enumerate(names):
        if names.count(name) > 1:
            yield StageProblem(index, "name", f"two stages are called {name!r}; give each its own")


def _name(index: int, stage: StageConfig) -> str:
    return stage.name or str(index + 1)


class _WrongValueError(Exception):
    def __init__(self, problem: StageProblem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def _configs(config: Config) -> Iterator[Config]:
    """The configuration of each stage. Raises _WrongValueError."""
    data, train = config.data.model_dump(), config.train.model_dump()
    for index, stage in enumerate(config.stages):
        if "corpus" in stage.data and data["files"] is not None and "files" not in stage.data:
            text = "data.files, from before, would replace its files; set files too (null: those of the card)"
            raise _WrongValueError(StageProblem(index, "data.corpus", text))
        data, train = {**data, **stage.data}, {**train, **stage.train}
        sections = {"data": (type(config.data), data), "train": (type(config.train), train)}
        parts = {}
        for name, (model, values) in sections.items():
            try:
                parts[name] = model.model_validate(values)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                key = ".".join([name, *map(str, first["loc"][:1])])
                raise _WrongValueError(StageProblem(index, key, in_plain_words(first))) from error
        yield config.model_copy(update={**parts, "stages": ()})
