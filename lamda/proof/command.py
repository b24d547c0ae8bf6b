"""`lamda prove-gpu`: what this GPU does with LaMDA, in parts that each have a process and a time limit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lamda import distributed
from lamda.config.errors import UserError, nearest
from lamda.durable import read_object, replace_file
from lamda.proof.parts import FINDINGS, PARTS, REHEARSE, TEXT, findings_file
from lamda.storage.lock import RunLock
from lamda.training.stop_requests import handling_signals

JSON, PAGE = "proof.json", "proof.html"
MIN_SECONDS = 15.0
"""A part with less time left does not begin."""
LOG_LINES = 12


def parser() -> argparse.ArgumentParser:
    """The options of `lamda prove-gpu`."""
    parser = argparse.ArgumentParser(
        prog="lamda prove-gpu", allow_abbrev=False,
        epilog="exit code: 0 if every part ran and nothing failed in it, else 1",
    )  # fmt: skip
    add = parser.add_argument
    add("--minutes", type=float, default=15.0, metavar="M", help="time for all parts together; default %(default)g")
    add(REHEARSE, action="store_true", help="every part on the CPU at toy size, in 90 s of one core")
    add("--to", type=Path, default=Path("gpu-proof"), metavar="FOLDER", help="where it writes; default %(default)s")
    add(
        "--text",
        type=Path,
        metavar="FOLDER",
        help="of the runs: train/*.jsonl.zst, val.jsonl.zst, tokenizer.model; default: Python's standard library",
    )
    add("--parts", nargs="+", default=list(PARTS), metavar="PART", help=f"only these: {', '.join(PARTS)}")
    return parser


def main(argv: list[str]) -> int:
    """As `lamda prove-gpu --help` says. Raises UserError."""
    options = parser().parse_args(argv)
    for name in options.parts:
        if name not in PARTS:
            raise UserError(f"--parts: there is no {name!r} among {', '.join(PARTS)}{nearest(name, PARTS)}")
    if not options.minutes > 0:  # nor is nan
        raise UserError(f"--minutes: a proof takes more than 0 minutes, not {options.minutes:g}")
    _require_device(rehearse=options.rehearse)
    folder = options.to.resolve()
    with _only_proof(folder), handling_signals(signal.default_int_handler):
        proof = Proof(folder, text=options.text, seconds=60 * options.minutes, rehearse=options.rehearse)
        for name in PARTS:
            if name in options.parts:
                proof.run(name)
    print(f"{proof.folder / PAGE}: the page; {proof.folder / JSON}: the figures")
    return 0 if proof.is_complete(options.parts) else 1


def _require_device(*, rehearse: bool) -> None:
    import torch

    if not rehearse and not torch.cuda.is_available():
        raise UserError("there is no GPU here; `lamda prove-gpu --rehearse` runs every part on the CPU at toy size")


def _only_proof(folder: Path) -> RunLock:
    """Make the folder, which two proofs at a time would spoil. Raises UserError."""
    try:
        (folder / FINDINGS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--to {folder}: cannot be written to ({error.strerror})") from error
    return RunLock(folder, option="--to")


class Proof:
    """A proof in a folder; it keeps the parts of an earlier one there. Raises UserError."""

    def __init__(self, folder: Path, *, text: Path | None, seconds: float, rehearse: bool) -> None:
        self.folder, self._rehearse = folder, rehearse
        self._ends = time.monotonic() + seconds
        if text is not None:
            _link(folder / TEXT, text.resolve())
        self._parts = _earlier_parts(folder / JSON, rehearse=rehearse)

    def run(self, name: str) -> None:
        """Run a part and write JSON and page again."""
        part, left = PARTS[name], self._ends - time.monotonic()
        print(f"{part.title}: ", end="", flush=True)
        if left < MIN_SECONDS:
            self._keep(name, {"status": f"left out: {max(0, left):.0f} s are left", "seconds": 0.0})
            return
        began, cpu = time.monotonic(), _cpu_seconds()
        findings_file(self.folder, name).unlink(missing_ok=True)
        self._keep(name, {"status": "running"}, quiet=True)
        try:
            status = self._process(name, limit=left if self._rehearse else min(part.seconds, left))
        except KeyboardInterrupt:
            self._keep(name, {"status": "interrupted", "seconds": time.monotonic() - began})
            raise
        spent = {"seconds": time.monotonic() - began, "cpu_seconds": _cpu_seconds() - cpu}
        self._keep(name, {"status": status, **spent})

    def is_complete(self, names: Sequence[str]) -> bool:
        """Whether all of these parts ran, and nothing failed in any."""
        parts = [self._parts[name] for name in names]
        return all(part["status"] == "done" and not part.get("failed") for part in parts)

    def _process(self, name: str, *, limit: float) -> str:
        """Run a part in a session of its own, which ends with it; returns its status."""
        log = self.folder / FINDINGS / f"{name}.log"
        command = [sys.executable, "-m", "lamda.proof.parts", name, str(self.folder)]
        command += [REHEARSE] if self._rehearse else []
        with log.open("wb") as out, _session(command, out, on_cpu=self._rehearse) as process:
            try:
                code = process.wait(timeout=limit)
            except subprocess.TimeoutExpired:
                return f"cut off after {limit:.0f} s"
        if code:
            last = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
            return "\n".join([f"failed with exit code {code}:", *last])
        return "done"

    def _keep(self, name: str, result: dict[str, Any], *, quiet: bool = False) -> None:
        file = findings_file(self.folder, name)
        found = json.loads(file.read_text("utf-8")) if file.exists() else {}
        self._parts[name] = result | found
        content = {"rehearsal": self._rehearse, "parts": self._parts}
        from lamda.proof.page import page

        replace_file(self.folder / JSON, json.dumps(content, indent=1) + "\n")
        replace_file(self.folder / PAGE, page(content))
        if not quiet:
            failed = f", {len(found['failed'])} failed in it" if found.get("failed") else ""
            print(f"{result['status'].splitlines()[0]}{failed} ({result['seconds']:.0f} s)", flush=True)


def _earlier_parts(file: Path, *, rehearse: bool) -> dict[str, Any]:
    """The parts of an earlier proof of this kind. Raises UserError for another file."""
    try:
        earlier = read_object(file)
        parts: dict[str, Any] = earlier["parts"] if earlier["rehearsal"] == rehearse else {}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: is not what this command writes; choose another folder with --to") from error
    return parts


def _cpu_seconds() -> float:
    """CPU time of the parts so far, their own processes included."""
    times = os.times()
    return times.children_user + times.children_system


def _link(link: Path, text: Path) -> None:
    """Make `link` lead to the text. Raises UserError."""
    if missing := [f"no {name}" for name in ("train", "val.jsonl.zst") if not (text / name).exists()]:
        raise UserError(
            f"--text {text}: has {' and '.join(missing)}; give a folder that `make gpu-kit` made, or leave it out"
        )
    if link.is_symlink():
        link.unlink()
    if link.exists():
        raise UserError(f"{link}: is another text already; choose another folder with --to")
    link.symlink_to(text)


@contextmanager
def _session(command: list[str], out: Any, *, on_cpu: bool) -> Iterator[subprocess.Popen[bytes]]:
    """A process without a launcher's variables, in its own session; what is left of it is killed at the end.

    It gets a pipe as its standard input, which closes even where this process is killed: then it kills its session.
    """
    launchers = distributed.rank_variables(distributed.World(), "")
    environment = {name: value for name, value in os.environ.items() if name not in launchers}
    if on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # before CUDA starts: a part may ask for a GPU's memory first
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environment, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
