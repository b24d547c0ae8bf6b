"""Weights & Biases as a mirror of metrics.jsonl, which stays authoritative.

One thread makes every call of the library; training only appends to its queue. A start finds the last step that W&B
has, replays missing steps from metrics.jsonl, and skips existing ones: a run that is killed and resumed, online or
offline, has each step once under one id. Steps that a rollback discarded keep their first values in W&B.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from lamda.best_effort import BestEffort, reason_of
from lamda.config.schema import Config
from lamda.durable import replace_file
from lamda.storage import manifest
from lamda.storage.metrics import read_metrics
from lamda.storage.run_directory import RunDirectory
from lamda.training.provenance import git_state

log = logging.getLogger(__name__)

MODES = ("online", "offline", "disabled")  # W&B gets everything now, later, or nothing
INIT_SECONDS = 30  # how long a start waits for W&B before it goes offline
UPLOAD_SECONDS = 40  # how long the end waits for what is still to be sent
END_SECONDS = 46  # limit of the end of a run, whatever the library does
HANG_SECONDS = 10  # the same for the end of a run that hangs: its other ranks wait for it to leave


class WandbMirror:
    """The W&B run of a run; a failure is reported once, and the run continues. run_id: None if W&B was never used."""

    def __init__(self, config: Config, *, folder: Path, run_id: str | None, step: int) -> None:
        """Returns immediately. step: of the state; metrics.jsonl has no later rows."""
        self._config, self._folder, self._step = config, folder, step
        self._queue: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._seen = 0
        self._has_stopped = False
        self._exit_code = 0
        self._thread: threading.Thread | None = None
        remembered = folder / "wandb" / "run-id"
        with suppress(OSError):
            run_id = run_id or remembered.read_text("utf-8")
        self.run_id = run_id
        self._mode = mirror_mode(config)
        if self._mode == "disabled":
            return
        if not is_installed():
            log.warning(
                "W&B is not installed: nothing is mirrored, metrics.jsonl has every row. After `pip install wandb` the "
                "next start sends them; set wandb.mode disabled if you want no mirror"
            )
            return
        self.run_id = run_id or secrets.token_hex(4)
        with BestEffort(f"W&B: {remembered} cannot be written"):
            remembered.parent.mkdir(exist_ok=True)
            replace_file(remembered, self.run_id)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        """Mirror a finished step; takes the caller microseconds."""
        row = dict(row)
        self._put(lambda run: self._send(run, row))

    def amend(self, metrics: dict[str, Any]) -> None:
        """Add metrics of a step already sent: they go to the run's summary, because W&B accepts each step once."""
        self._put_alone("metrics of an evaluation", lambda run: run.summary.update(metrics))

    def alert(self, title: str, text: str) -> None:
        """Send the run's owner an alert."""
        self._put_alone(f"the alert {title!r}", lambda run: run.alert(title[:63], text, level="WARN"))

    def checkpoint(self, path: Path, *, best: bool) -> None:
        """Log a complete checkpoint as an artifact, as `wandb.checkpoints` says."""
        mode = self._config.wandb.checkpoints
        if mode != "none":
            self._put_alone(f"checkpoint {path}", lambda run: _log_checkpoint(run, path, mode=mode, best=best))

    def finish(self, *, exit_code: int = 0, seconds: float | None = None) -> None:
        """Wait until everything is sent, at most about `seconds` (END_SECONDS by default).

        The next start sends what W&B did not receive. exit_code: W&B shows the run as finished for 0, else as failed.
        """
        if self._thread is None:
            return
        self._exit_code, seconds = exit_code, END_SECONDS if seconds is None else seconds
        self._queue.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._say_stopped(f"it did not finish within {seconds:g} s")
            _kill_service()
            self._thread.join(2)

    def _put(self, action: Callable[[Any], None]) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._queue.put(action)

    def _put_alone(self, what: str, action: Callable[[Any], object]) -> None:
        """Queue an action whose failure does not affect later ones."""

        def attempt(run: Any) -> None:
            with BestEffort(f"W&B did not receive {what}", errors=Exception):
                action(run)

        self._put(attempt)

    def _work(self) -> None:
        try:
            run = self._start()
            if self._seen < self._step:
                for row in read_metrics(RunDirectory(self._folder).metrics):
                    if row["step"] <= self._step:
                        self._send(run, row)
            for action in iter(self._queue.get, None):
                action(run)
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._say_stopped(reason_of(error))
        with suppress(Exception):
            # So that nothing of the library delays the exit of the interpreter.
            import wandb

            wandb.teardown()

    def _say_stopped(self, reason: str) -> None:
        if not self._has_stopped:
            self._has_stopped = True
            log.warning("W&B stopped (%s): metrics.jsonl has every row, the next start sends the rest", reason)

    def _send(self, run: Any, row: dict[str, Any]) -> None:
        if row["step"] > self._seen:
            run.log({key: value for key, value in row.items() if _is_shown(value)}, step=row["step"], commit=True)
            self._seen = row["step"]

    def _start(self) -> Any:
        """The W&B run, online if possible; `_seen` becomes the last step that W&B has."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))
        logs = self._logs()
        if self._mode == "online":
            try:
                sign_in()
                run = self._init("online")
            except Exception as error:
                self._go_offline(reason_of(error), logs)
            else:
                self._seen = max(0, run.starting_step - 1) if run.resumed else 0
                for old in logs:
                    # This start sends their rows; `wandb sync` would send them twice.
                    old.with_suffix(".wandb.synced").touch()
                return run
        self._seen = next((step for old in logs if (step := _last_step(old))), 0)
        return self._init("offline")

    def _go_offline(self, reason: str, logs: list[Path]) -> None:
        """Warn, and remove what the failed start left: it would keep the id and look like a run."""
        import wandb

        wandb.teardown()
        for empty in set(self._logs()) - set(logs):
            shutil.rmtree(empty.parent, ignore_errors=True)
        kept = self._folder / "wandb"
        # `wandb sync` continues a run only from the server's last step: after rows that were sent online, and
        # perhaps not all received, it would renumber the rest.
        pure = all(old.parent.name.startswith("offline-") for old in logs)
        by_hand = f", or `wandb sync {kept}`" if pure else ""
        log.warning(
            "W&B is offline (%s): rows are kept in %s; the next start that reaches W&B sends them%s",
            reason,
            kept,
            by_hand,
        )

    def _init(self, mode: Literal["online", "offline"]) -> Any:
        import wandb

        settings = self._config.wandb
        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or self._folder.resolve().name,
            id=self.run_id,
            resume="allow",
            dir=self._folder,
            mode=mode,
            config={**self._config.model_dump(mode="json"), "git_commit": (git_state() or {}).get("commit")},
            settings=wandb.Settings(
                console="off",
                silent=True,
                init_timeout=INIT_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=1,
                # Command line, SLURM_* variables and the repository's address can hold secrets.
                x_disable_meta=True,
                disable_git=True,
                disable_code=True,
                # "Stop run" in the browser; the library's own way is a SIGINT in the middle of a step.
                stop_fn=RunDirectory(self._folder).stop.touch,
            ),
        )
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        return run

    def _logs(self) -> list[Path]:
        """The library's transaction logs of this id, one per start, newest first."""
        logs = self._folder.glob(f"wandb/*run-*/run-{self.run_id}.wandb")
        return sorted(logs, key=lambda file: file.stat().st_mtime_ns, reverse=True)


def _log_checkpoint(run: Any, path: Path, *, mode: Literal["reference", "upload"], best: bool) -> None:
    """Log a complete checkpoint as the next version of artifact `<run id>-checkpoint`, of type "model".

    mode: "reference" stores the manifest and the files' addresses, "upload" the files. Metadata: the step,
    and size and sha256 of every file. Aliases: "latest", the folder's name, and "best" if it is that.
    Raises OSError where the checkpoint is gone, and the library's errors.
    """
    import wandb

    content = manifest.read(path)
    artifact = wandb.Artifact(
        f"{run.id}-checkpoint", type="model", metadata={"step": content["step"], "files": content["files"]}
    )
    # A checkpoint never changes: nothing needs to be copied before it is read.
    if mode == "upload":
        artifact.add_dir(str(path), policy="immutable", skip_cache=True)
    else:
        # Unlike the addresses, the manifest differs between two checkpoints of one name.
        artifact.add_file(str(path / manifest.MANIFEST), policy="immutable", skip_cache=True)
        artifact.add_reference(path.resolve().as_uri(), name=path.name, checksum=False)
    run.log_artifact(artifact, aliases=["latest", path.name, *(["best"] if best else [])])


def mirror_mode(config: Config) -> str:
    """Whichever of wandb.mode and WANDB_MODE sends less; a WANDB_MODE that is not known sends nothing."""
    given = os.environ.get("WANDB_MODE", "").lower()
    known = {"": MODES[0], "run": "online", "shared": "online", "dryrun": "offline", **{mode: mode for mode in MODES}}
    if given not in known:
        log.warning("WANDB_MODE is %r, none of %s: W&B is sent nothing", given, ", ".join(MODES))
    return max(config.wandb.mode, known.get(given, "disabled"), key=MODES.index)


def is_installed() -> bool:
    """Whether the library is installed; a folder `wandb/` of a run in the working directory does not count."""
    spec = importlib.util.find_spec("wandb")
    return spec is not None and spec.origin is not None


def sign_in() -> str:
    """Sign in; returns W&B's address. Raises `wandb.errors.AuthenticationError` if there is no key."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    if wbauth.authenticate_session(host=host, source="lamda", prompt=False) is None:
        raise wandb.errors.AuthenticationError("no W&B key: set WANDB_API_KEY, or run `wandb login`")
    return host


def _last_step(transactions: Path) -> int:
    """The last step in a transaction log; 0 where there is none.

    An offline log whose last record was cut short by a kill is set aside and counts as empty: `wandb sync` would stop
    at that record, and send its rows again every time.
    """
    try:
        step, damage = _inspect(transactions)
    except (OSError, ValueError, KeyError) as error:
        step, damage = 0, reason_of(error)
    if damage and transactions.parent.name.startswith("offline-"):
        transactions.rename(transactions.with_suffix(".wandb.damaged"))
        log.warning("%s is set aside (%s); its rows are written again", transactions, damage)
        return 0
    return step


def _inspect(transactions: Path) -> tuple[int, str]:
    """The last step in a transaction log, and what is wrong with the log."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(transactions)]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stderr is not None
        for line in reader.stdout:
            if '"type":"history"' in line:
                last = line
        problem = reader.stderr.read().strip()
    step = json.loads(last)["history"]["step"]["num"] if last else 0
    return step, problem if reader.returncode or "incomplete" in problem else ""


def _is_shown(value: object) -> bool:
    return value is not None and not (isinstance(value, float) and not isfinite(value))


def _kill_service() -> None:
    """Kill the library's service process, which it would wait for without a limit."""
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            for child in children.read_text("utf-8").split():
                if Path(f"/proc/{child}/comm").read_text("utf-8").strip() == "wandb-core":
                    os.kill(int(child), signal.SIGKILL)
