"""The commands of README and documentation are run, as they stand, in a folder with a small trained run.

A training command gets a few keys more, which make it small, and an evaluation of a run a small text. `make docs-test`;
some minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.said import PAGES, ROOT, commands

SMALL = (
    "--train.steps 4 --train.warmup_steps 1 --tokenizer.train_bytes 300000 --model.n_layers 1 --eval.batches 1 "
    "--eval.full_batches 1 --checkpoint.every 2 --run.threads 1 --wandb.mode disabled "
    "--deepspeed.config deepspeed/fp32.json"  # bf16 takes six times as long on a processor without its instructions
)
ELSEWHERE = {
    "make": "`.ci/run` calls the targets",
    "pip install": "`make package-test` installs",
    "python -m venv": "`make package-test` makes one",
    ".venv/bin/": "`make package-test` installs and calls what was installed",
    "python -m pytest": "the suite itself",
    "lamda serve": "`make serve-test` talks with it",
}
"""What another suite runs."""
ENDS = {"lamda doctor": (0, 1), "lamda checkpoint diff": (0, 1)}
"""Exit codes of commands whose code is a finding."""


def runnable(page):
    """The commands that a page wants run here."""
    said = [each for each in commands(page) if not (each.is_inline or each.is_synopsis or each.hardware)]
    return [each for each in said if not each.text.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with what the pages speak of: a finished run, texts, a cluster file; and programs that are ours."""
    folder = tmp_path_factory.mktemp("reader")
    programs = folder / "bin"
    programs.mkdir()
    for name, code in {
        "lamda": 'exec "$PYTHON" -c "import sys; from lamda.cli import main; sys.exit(main())" "$@"',
        "python": 'exec "$PYTHON" "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{code}\n")
        (programs / name).chmod(0o755)
    (folder / "texts").mkdir()
    for name, sources in {"one.jsonl": ROOT / "lamda", "held-out.jsonl": ROOT / "tests/config"}.items():
        lines = [json.dumps({"text": path.read_text("utf-8")}) for path in sorted(sources.rglob("*.py"))]
        (folder / "texts" / name).write_text("\n".join(lines))
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "configs/cluster/slurm.yaml", folder / "my-site.yaml")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    done = execute(f"lamda pretrain --config tiny {SMALL}", folder)
    assert done.returncode == 0, done.stderr
    return folder


def execute(text, folder):
    """Run a line as a shell does."""
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )


def small(text):
    """The command, with keys that make training short, fewer rounds of a benchmark, and little text to score."""
    if text.startswith("python scripts/benchmark.py flax "):
        return text.replace(
            "--steps 12", "--steps 1 --model.n_layers 1 --train.global_batch_size 2 --train.micro_batch_size 1"
        )
    if text.startswith(("lamda eval ", "lamda evaluate ")) and not {"--files", "--tasks"} & {*text.split()}:
        return f"{text} --files texts/held-out.jsonl"
    return f"{text} {SMALL}" if text.startswith(("lamda pretrain", "python scripts/pretrain_flax.py")) else text


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_they_say(page, place):
    for said in runnable(page):
        done = execute(small(said.text), place)
        allowed = next((codes for name, codes in ENDS.items() if said.text.startswith(name)), (said.code or 0,))
        assert done.returncode in allowed, f"{said}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr, f"{said}\n{done.stderr}"


def test_what_is_run_elsewhere_is_said_in_the_pages():
    texts = [said.text for page in PAGES for said in commands(page)]
    assert all(any(text.startswith(start) for text in texts) for start in ELSEWHERE)
