"""The loop and all that it needs know no framework; what knows DeepSpeed loads it by the time it is needed."""

import subprocess
import sys

import pytest

MODULES = (
    "train", "loop", "saving", "pretraining", "report", "row", "resume", "manifest", "health", "task", "main", "text",
    "evaluation", "framework", "deepspeed_framework",
)  # fmt: skip


@pytest.mark.parametrize(
    "modules",
    [["lamda.training.train"], [f"lamda.training.{name}" for name in MODULES] + ["lamda.dialog.finetuning"]],
    ids=["train", "each"],
)
def test_a_run_is_imported_without_deepspeed(modules):
    code = "import importlib, sys\n"
    code += f"for name in {modules}: importlib.import_module(name)\n"
    code += "sys.exit('deepspeed' in sys.modules or 'lamda.training.engine' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_checked_early_needs_no_torch():
    code = "import sys, lamda.training.main, lamda.dialog.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
