"""`lamda eval`: a trained model on held-out text, or on lm-eval tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orjson

from lamda.config.errors import UserError
from lamda.console import Progress
from lamda.interop.harness.tasks import Tasks, task_metrics

ERROR = "_stderr"


def main(argv: list[str]) -> int:
    """As `lamda eval --help` says; raises UserError."""
    options = parser().parse_args(argv)
    _check(options)
    from lamda.inference.loading import find_checkpoint

    path = find_checkpoint(options.path)
    report, lines = _on_text(path, options.files) if options.tasks is None else _on_tasks(options)
    print(_json(report) if options.json else "\n".join(lines), flush=True)
    if options.output is not None:
        try:
            options.output.write_text(_json(report), "utf-8")
        except OSError as error:
            problem = f"cannot be written ({error.strerror}); the results are above"
            raise UserError(f"--output {options.output}: {problem}") from error
    return 0


def _on_text(path: Path, files: list[str] | None) -> tuple[dict[str, Any], Iterable[str]]:
    """The report, and its lines for a person."""
    from lamda.training import evaluation

    report = evaluation.evaluate_checkpoint(path, files=files)
    return report, evaluation.table(report)


def _on_tasks(options: argparse.Namespace) -> tuple[dict[str, Any], Iterable[str]]:
    """The report, and its lines for a person."""
    from lamda.inference.loading import load_run
    from lamda.interop.harness.language_model import HarnessModel
    from lamda.interop.harness.scoring import LocalDecoder

    tasks = Tasks.load(_names(options.tasks), folder=options.include_path)
    loaded = load_run(options.path)
    decoder = LocalDecoder(loaded.model, loaded.tokenizer, options.batch_size or loaded.config.train.micro_batch_size)
    length = loaded.config.data.sequence_length
    model = HarnessModel(decoder, loaded.tokenizer, sequence_length=length, show_progress=_progress)
    results = tasks.run(model, limit=options.limit, num_fewshot=options.num_fewshot)
    report = {
        "checkpoint": str(loaded.path),
        "lm_eval": version("lm-eval"),
        "limit": options.limit,
        "sequence_length": length,
        "tasks": task_metrics(results),
        "num_fewshot": dict(results["n-shot"]),
        "examples": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "versions": dict(results["versions"]),
    }
    return report, table(report)


def _names(tasks: str) -> list[str]:
    return [name.strip() for name in tasks.split(",") if name.strip()]


def _json(report: dict[str, Any]) -> str:
    """The report as JSON; a number that is not finite is null."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS
    return orjson.dumps(report, option=options).decode()


def parser() -> argparse.ArgumentParser:
    """The options of `lamda eval`."""
    parser = argparse.ArgumentParser(prog="lamda eval", allow_abbrev=False)
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="a run's newest checkpoint, or this one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--files", metavar="PATH", nargs="+", help="text: files, folders or globs; default: the run's validation text"
    )
    what.add_argument("--tasks", metavar="NAME,NAME", help="tasks, groups or tags; `lm-eval ls tasks` lists them")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to a file as well")
    tasks = parser.add_argument_group("with --tasks")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N examples of each task")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt; default: the task's own")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="default: the run's train.micro_batch_size")
    tasks.add_argument("--include-path", type=Path, metavar="DIR", help="folder of more task files, searched first")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for invalid options."""
    minimum = {"limit": 1, "num_fewshot": 0, "batch_size": 1}
    problems = [
        f"--{name.replace('_', '-')} is {value}: give at least {lowest}"
        for name, lowest in minimum.items()
        if (value := getattr(options, name)) is not None and value < lowest
    ]
    if options.output is not None and not options.output.parent.is_dir():
        problems.append(f"--output {options.output}: there is no folder {options.output.parent}")
    if options.output is not None and options.output.is_dir():
        problems.append(f"--output {options.output}: is a folder; name a file")
    if options.tasks is None:
        given = [name for name in (*minimum, "include_path") if getattr(options, name) is not None]
        problems += [f"--{name.replace('_', '-')}: give --tasks as well" for name in given]
    elif not _names(options.tasks):
        problems.append("--tasks is empty; `lm-eval ls tasks` lists the tasks of lm-eval")
    if problems:
        raise UserError("\n".join(problems))


def _error(named: dict[str, float], name: str) -> str:
    """The standard error of a metric, if there is one."""
    metric, slash, of_filter = name.partition("/")
    error = named.get(metric + ERROR + slash + of_filter)
    return "" if error is None else f"± {error:.4f}"


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    with Progress(what, total=total, unit="requests") as shown:
        yield shown.advance


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as lines of text."""
    rows = [
        (task, name, f"{value:.4f}", _error(named, name))
        for task, named in report["tasks"].items()
        for name, value in named.items()
        if ERROR not in name
    ]
    width = max([len(task) for task, *_ in rows] + [4])
    wide = max([len(name) for _, name, *_ in rows] + [6])
    yield f"{'task':{width}}  {'metric':{wide}}{'value':>12}{'':12}{'shots':>6}{'examples':>10}"
    for task, name, value, error in rows:
        shots, examples = report["num_fewshot"].get(task, ""), report["examples"].get(task, "")
        yield f"{task:{width}}  {name:{wide}}{value:>12} {error:11}{shots:>6}{examples:>10}"
