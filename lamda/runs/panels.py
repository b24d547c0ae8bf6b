"""What there is to see of a run, in the order in which a person watches it: for plots, reports and W&B alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SPECIAL = ("eval/loss", "eval/bits_per_byte", "eval/perplexity")
"""Evaluations of held-out text; every other `eval/...` is a task's, or an attribute's."""


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    columns: names in metrics.jsonl; one that ends in `/*` stands for all below it. unit: of the vertical axis.
    is_large: whether its numbers are written short (`2.1M`). is_noisy: whether a mean shows more than the points.
    from_zero: whether what counts is its size, and not its change.
    """

    title: str
    columns: tuple[str, ...]
    unit: str
    is_large: bool = False
    is_noisy: bool = False
    from_zero: bool = False

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of a run's columns that belong here."""
        return [name for name in names if any(_matches(name, column) for column in self.columns)]


@dataclass(frozen=True)
class Section:
    """Panels that answer one question."""

    title: str
    question: str
    panels: tuple[Panel, ...]


def _matches(name: str, column: str) -> bool:
    if not column.endswith("/*"):
        return name == column
    below = column.removesuffix("*")
    return name.startswith(below) and not (below == "eval/" and is_held_out(name))


def is_held_out(name: str) -> bool:
    """Whether a column tells of held-out text, and not of tasks."""
    return name in SPECIAL or name.startswith(("eval/loss/", "eval/full/"))


SECTIONS = (
    Section(
        "Loss",
        "Does it learn?",
        (
            Panel("Training loss", ("loss",), "nats a token", is_noisy=True),
            Panel("Training loss by domain", ("loss/*",), "nats a token", is_noisy=True),
            Panel("Learning rate", ("lr",), "peak rate of the step", from_zero=True),
        ),
    ),
    Section(
        "Throughput",
        "Is the machine busy?",
        (
            Panel(
                "Throughput", ("tokens_per_second",), "tokens a second", is_large=True, is_noisy=True, from_zero=True
            ),
            Panel("MFU", ("mfu",), "share of the peak FLOPs", is_noisy=True, from_zero=True),
            Panel(
                "Model FLOPs",
                ("model_flops_per_second",),
                "FLOPs a second and rank",
                is_large=True,
                is_noisy=True,
                from_zero=True,
            ),
            Panel("Step time", ("step_seconds",), "seconds a step", is_noisy=True, from_zero=True),
        ),
    ),
    Section(
        "Data",
        "Does it wait for text?",
        (
            Panel("Data wait", ("data_wait_seconds",), "seconds waited in a step", is_noisy=True, from_zero=True),
            Panel("Tokens by domain", ("tokens/*",), "targets in a step", is_large=True, is_noisy=True, from_zero=True),
        ),
    ),
    Section(
        "Health",
        "Is it stable?",
        (
            Panel("Gradient norm", ("grad_norm",), "global norm before clipping", is_noisy=True, from_zero=True),
            Panel("Bad steps", ("skipped_steps", "rollbacks"), "refused steps and rollbacks so far", from_zero=True),
        ),
    ),
    Section(
        "Checkpoints",
        "What do saves cost?",
        (Panel("Stalls by saves", ("save_seconds",), "seconds stalled in a step", from_zero=True),),
    ),
    Section(
        "Evaluation",
        "Is it good on what it has not seen?",
        (
            Panel("Held-out loss", ("eval/loss",), "nats a token"),
            Panel("Held-out bits per byte", ("eval/bits_per_byte",), "bits a byte"),
            Panel("Held-out loss by domain", ("eval/loss/*",), "nats a token"),
            Panel("Perplexity of responses", ("eval/perplexity",), "perplexity"),
            Panel("Tasks and ratings", ("eval/*",), "figure of the task"),
        ),
    ),
)

PANELS = tuple(panel for section in SECTIONS for panel in section.panels)


def panel_of(name: str) -> Panel | None:
    """The panel that a column is shown in."""
    return next((panel for panel in PANELS if panel.of([name])), None)
