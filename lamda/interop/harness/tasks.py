"""Tasks of lm-eval and of folders of task files: find, load with their data, and run them."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from lamda.config.errors import UserError, all_of, nearest

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

RESAMPLES = 1000
"""Bootstrap samples for the standard error of a metric that is not a mean, such as perplexity."""


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks, their data on this machine."""

    _manager: TaskManager
    _specs: list[Task | Group]

    @classmethod
    def load(cls, names: Sequence[str], *, folder: Path | None = None) -> Tasks:
        """Tasks, groups and tags by name, from `folder` first; paths in its task files are relative to it.

        Raises UserError for unknown names and unavailable data.
        """
        _require()
        folder = None if folder is None else folder.absolute()  # loading changes the working directory
        manager = _manager(names, folder)
        if unknown := [name for name in names if name not in manager.task_index]:
            problems = [f"there is no task {name!r}{nearest(name, manager.all_tasks)}" for name in unknown]
            raise UserError("\n".join([*problems, "`lm-eval ls tasks` lists those of lm-eval"]))
        specs: list[Task | Group] = []
        all_of(*(lambda name=name: specs.extend(_load(manager, name, folder)) for name in names))
        try:
            loaded = manager.load(specs)["tasks"]
        except ValueError as error:
            raise UserError(f"the tasks overlap: {error}") from error
        problems = [problem for name, task in loaded.items() if (problem := _problem(name, task))]
        if problems:
            raise UserError("\n".join(problems))
        return cls(manager, specs)

    def run(self, model: LM, *, limit: int | None, num_fewshot: int | None) -> dict[str, Any]:
        """lm-eval's results with standard errors. Raises UserError if a task has too few examples.

        limit: examples per task. num_fewshot: replaces the tasks' own.
        """
        from lm_eval import evaluator, simple_evaluate

        # It asks git for the working directory's commit; Python's redirection does not catch git's error output.
        with quiet(), patch.object(evaluator, "get_git_commit_hash", lambda: None):
            try:
                return simple_evaluate(
                    model,
                    tasks=list(self._specs),
                    task_manager=self._manager,
                    limit=limit,
                    num_fewshot=num_fewshot,
                    bootstrap_iters=RESAMPLES,
                    log_samples=False,
                )
            except ValueError as error:
                raise UserError(
                    f"lm-eval cannot run the tasks ({_one_line(error)}); if a task has fewer examples than a prompt "
                    "needs, lower --num-fewshot"
                ) from error

    def run_in_training(self, model: LM, *, limit: int | None) -> dict[str, Any]:
        """The same results, without standard errors and the side effects of `simple_evaluate`.

        It starts programs to describe the machine, and seeds global random numbers: unsafe during training.
        """
        from lm_eval.defaults import DEFAULT_OTHER_SEED
        from lm_eval.evaluator import evaluate

        loaded = self._manager.load(list(self._specs))
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        with quiet():
            return evaluate(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)


def task_metrics(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by task or group and name: `metric`, `metric/filter` if a task filters the output, `metric_stderr`."""
    found: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        numbers = {key: value for key, value in values.items() if "," in key and isinstance(value, int | float)}
        named = {key.removesuffix(",none").replace(",", "/"): float(value) for key, value in numbers.items()}
        if named:
            found[task] = named
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send progress bars and messages of lm-eval to the log."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield
    log.debug("lm-eval: %s", output.getvalue())


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"tasks need lm-eval ({error}); pip install 'lamda-pytorch[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every default of a task file


def _manager(names: Sequence[str], folder: Path | None) -> TaskManager:
    """A manager that knows the names: of the folder only, if it has all, since lm-eval's index takes seconds."""
    from lm_eval.tasks import TaskManager

    if folder is not None:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder of task files")
        local = TaskManager(include_path=folder, include_defaults=False)
        if all(name in local.task_index for name in names):
            return local
    return TaskManager(include_path=folder)


def _load(manager: TaskManager, name: str, folder: Path | None) -> list[Task | Group]:
    """A task, a group, or the tasks of a tag. Raises UserError."""
    try:
        # Task files name data relative to the working directory; a folder of tasks must work from anywhere.
        with contextlib.chdir(folder or Path()), quiet():
            loaded = manager.load([name])
    except OSError as error:
        raise UserError(
            f"task {name}: its data is not available ({_one_line(error)}). Run it once with access to the hub and copy "
            "its cache (HF_HOME) here, or use a folder of task files with local data"
        ) from error
    except Exception as error:
        raise UserError(f"task {name}: cannot be loaded ({_one_line(error)})") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _problem(name: str, task: Task) -> str | None:
    if getattr(task, "UNSAFE_CODE", False):
        return f"task {name}: runs code that the model writes, which is not supported"
    if getattr(task, "MULTIMODAL", False):
        return f"task {name}: is multimodal; LaMDA reads text only"
    return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
