"""`lamda dashboard`: a W&B workspace with the panels of `lamda report`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lamda.config.errors import UserError
from lamda.config.loading import load_config
from lamda.runs.panels import GROUPS, Panel
from lamda.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

NAME = "LaMDA"
GPUS = 8
"""GPUs of rank 0's machine, which W&B monitors; missing ones draw nothing."""
SYSTEM = {
    "GPU utilization": [f"system/gpu.{gpu}.gpu" for gpu in range(GPUS)],
    "GPU memory": [f"system/gpu.{gpu}.memoryAllocated" for gpu in range(GPUS)],
    "GPU power": [f"system/gpu.{gpu}.powerWatts" for gpu in range(GPUS)],
    "GPU temperature": [f"system/gpu.{gpu}.temp" for gpu in range(GPUS)],
    "CPU": ["system/cpu"],
    "Memory": ["system/memory_percent"],
    "Disk": ["system/disk./.usageGB"],
    "Network": ["system/network.sent", "system/network.recv"],
}
"""W&B's system metrics by title."""
TASKS = "^eval/([^fl]|l[^o]|lo[^s]|los[^s]|loss[^/]|f[^u]|fu[^l]|ful[^l]|full[^/])[^/]*/."
"""`eval/<task>/<metric>`, without `eval/loss/<domain>` and `eval/full/...`: W&B's server has no lookahead."""
SMOOTHING = 20
"""W&B's smoothing factor for noisy panels."""


def main(argv: list[str]) -> int:
    """As `lamda dashboard --help` says; raises UserError."""
    options = parser().parse_args(argv)
    project, entity = _address(options)
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lamda dashboard needs wandb-workspaces ({error}); pip install 'lamda-pytorch[dashboard]'"
        ) from error
    if options.dry_run or options.json:
        workspace = build(entity=entity or "ENTITY", project=project)
        print(json.dumps(specification(workspace), indent=1) if options.json else "\n".join(outline(workspace)))
        return 0
    print(save(entity=entity, project=project))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options of `lamda dashboard`."""
    parser = argparse.ArgumentParser(prog="lamda dashboard", allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run, for its project and entity")
    parser.add_argument("--project", metavar="P", help="W&B project, instead of a run")
    parser.add_argument("--entity", metavar="E", help="W&B user or team; default: the run's, else the account's own")
    parser.add_argument("--dry-run", action="store_true", help="print the panels, and save nothing")
    parser.add_argument("--json", action="store_true", help="print the specification for W&B, and save nothing")
    return parser


def _address(options: argparse.Namespace) -> tuple[str, str | None]:
    """Project and entity from the flags, else from the run."""
    if options.run is None:
        if options.project is None:
            raise UserError("give a RUN, whose project it is, or --project P")
        return options.project, options.entity
    file = RunDirectory(options.run).config
    if not file.is_file():
        raise UserError(f"{options.run}: no run here")
    ours = load_config(["--config", str(file)]).wandb
    return options.project or ours.project, options.entity or ours.entity


def build(*, entity: str, project: str) -> Workspace:
    """The workspace, without sending it."""
    from wandb_workspaces.reports.v2.interface import LinePlot
    from wandb_workspaces.workspaces import Section, SectionLayoutSettings, Workspace, WorkspaceSettings

    def section(title: str, panels: Sequence[LinePlot]) -> Section:
        columns = min(3, len(panels))
        layout = SectionLayoutSettings(columns=columns, rows=-(-len(panels) // columns))
        return Section(name=title, panels=[*panels], is_open=True, layout_settings=layout)

    system = [LinePlot(title=title, x="RelativeTime(Process)", y=[*names]) for title, names in SYSTEM.items()]
    sections = [section(each.title, [_plot(panel) for panel in each.panels]) for each in GROUPS]
    return Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[*sections, section("System", system)],
        settings=WorkspaceSettings(x_axis="tokens"),
    )


def _plot(panel: Panel) -> LinePlot:
    from wandb_workspaces.reports.v2.interface import LinePlot

    first = panel.columns[0]
    options: dict[str, Any] = {"y": [*panel.columns]}
    if first.endswith("/*"):  # the names of domains and tasks depend on the run
        options = {"metric_regex": TASKS if first == "eval/*" else f"^{re.escape(first.removesuffix('*'))}."}
    if panel.is_noisy:
        options |= {"smoothing_type": "average", "smoothing_factor": SMOOTHING, "smoothing_show_original": True}
    return LinePlot(title=panel.title, x="tokens", title_x="tokens", title_y=panel.unit, **options)


def specification(workspace: Workspace) -> dict[str, Any]:
    """The JSON that W&B would receive."""
    return workspace._to_model().spec.model_dump(by_alias=True, exclude_none=True, mode="json")


def outline(workspace: Workspace) -> list[str]:
    """Sections and panels as text."""
    lines = [f"{workspace.entity}/{workspace.project}: workspace {workspace.name!r}"]
    for section in workspace.sections:
        lines.append(section.name)
        for plot in (cast("LinePlot", panel) for panel in section.panels):
            lines.append(f"  {plot.title}: {plot.metric_regex or ', '.join(map(str, cast('list[str]', plot.y)))}")
    return lines


def save(*, entity: str | None, project: str) -> str:
    """Create the workspace in W&B; returns its URL. Raises UserError if that fails."""
    import wandb

    from lamda.training.wandb_logger import sign_in

    try:
        wandb.setup(wandb.Settings(silent=True))
        sign_in()
        owner = entity or wandb.Api().default_entity
        if owner is None:
            raise ValueError("the account has no default entity")
        workspace = build(entity=owner, project=project)
        workspace.save()  # type: ignore[no-untyped-call]  # wandb_workspaces leaves it untyped
    except Exception as error:
        raise UserError(
            f"W&B rejected the workspace ({type(error).__name__}: {error}); `lamda dashboard --dry-run` shows it, "
            "and `lamda report` needs no account"
        ) from error
    return workspace.url
