"""The panels of plots, reports and W&B, in the order in which to look at a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

SPECIAL = ("eval/loss", "eval/bits_per_byte", "eval/perplexity")
"""Metrics of held-out text; every other `eval/...` column belongs to a task or to an attribute."""


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis.

    columns: names in metrics.jsonl; `prefix/*` matches all columns with that prefix. unit: of the vertical axis.
    is_large: abbreviate numbers (`2.1M`). is_noisy: smooth. from_zero: start the vertical axis at 0.
    """

    title: str
    columns: tuple[str, ...]
    unit: str
    is_large: bool = False
    is_noisy: bool = False
    from_zero: bool = False

    def of(self, names: Iterable[str]) -> list[str]:
        """The columns among `names` that this panel shows."""
        found = [name for name in names if any(fnmatchcase(name, column) for column in self.columns)]
        return [name for name in found if self.columns != ("eval/*",) or not is_held_out(name)]


class PanelGroup:
    """Panels that answer one question."""

    def __init__(self, title: str, question: str, *panels: Panel) -> None:
        self.title, self.question, self.panels = title, question, panels


def is_held_out(name: str) -> bool:
    """Whether a column measures held-out text rather than a task."""
    return name in SPECIAL or name.startswith(("eval/loss/", "eval/full/"))


GROUPS = (
    PanelGroup(
        "Loss",
        "Does it learn?",
        Panel("Training loss", ("loss",), "nats per token", is_noisy=True),
        Panel("Training loss by domain", ("loss/*",), "nats per token", is_noisy=True),
        Panel("Learning rate", ("lr",), "peak rate of the step", from_zero=True),
    ),
    PanelGroup(
        "Throughput",
        "Is the machine busy?",
        Panel("Throughput", ("tokens_per_second",), "tokens per second", is_large=True, is_noisy=True, from_zero=True),
        Panel("MFU", ("mfu",), "share of the peak FLOPs", is_noisy=True, from_zero=True),
        Panel(
            "Model FLOPs",
            ("model_flops_per_second",),
            "FLOP/s per device",
            is_large=True,
            is_noisy=True,
            from_zero=True,
        ),
        Panel("Step time", ("step_seconds",), "seconds per step", is_noisy=True, from_zero=True),
    ),
    PanelGroup(
        "Data",
        "Does it wait for text?",
        Panel("Data wait", ("data_wait_seconds",), "seconds waited in a step", is_noisy=True, from_zero=True),
        Panel("Tokens by domain", ("tokens/*",), "targets in a step", is_large=True, is_noisy=True, from_zero=True),
    ),
    PanelGroup(
        "Health",
        "Is it stable?",
        Panel("Gradient norm", ("grad_norm",), "global norm before clipping", is_noisy=True, from_zero=True),
        Panel("Skipped steps", ("skipped_steps", "rollbacks"), "skipped steps and rollbacks so far", from_zero=True),
    ),
    PanelGroup(
        "Checkpoints",
        "What do saves cost?",
        Panel("Checkpoint stall time", ("save_seconds",), "seconds of stall in a step", from_zero=True),
    ),
    PanelGroup(
        "Evaluation",
        "How good is it on unseen text?",
        Panel("Held-out loss", ("eval/loss",), "nats per token"),
        Panel("Held-out bits per byte", ("eval/bits_per_byte",), "bits per byte"),
        Panel("Held-out loss by domain", ("eval/loss/*",), "nats per token"),
        Panel("Perplexity of responses", ("eval/perplexity",), "perplexity"),
        Panel("Tasks and ratings", ("eval/*",), "figure of the task"),
    ),
)

PANELS = tuple(panel for group in GROUPS for panel in group.panels)


def panel_of(name: str) -> Panel | None:
    """The panel that shows a column."""
    return next((panel for panel in PANELS if panel.of([name])), None)
