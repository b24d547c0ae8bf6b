"""The recipes of CONTRIBUTING.md: each is carried out on a copy of the package, in the files that it names alone."""

import bz2
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import make_text
from tests.launch import ENVIRONMENT, ROOT

SETTINGS = """
model: {vocab_size: 400, d_model: 32, n_layers: 1, n_heads: 2, d_head: 16, d_ff: 64, attention: einsum}
data: {corpus: standard_library, sequence_length: 32}
train: {steps: 3, global_batch_size: 4, micro_batch_size: 2, optimizer: sgd, lr: 1.0, warmup_steps: 1}
wandb: {mode: disabled}
"""

GREET = """
import argparse
from collections.abc import Sequence

from lamda.config.errors import UserError


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="lamda greet")
    found.add_argument("--name", help="whom to greet")
    return found


def main(argv: Sequence[str]) -> None:
    name = parser().parse_args(argv).name
    if not name:
        raise UserError("--name is empty: give a name")
    print(f"Hello, {name}")
"""

EINSUM = """
import torch
from torch import Tensor

from lamda.model.attention.math import bias, mask

__all__ = ["attend", "bias", "mask"]


def attend(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, bias_HLM: Tensor, hidden_BLM: Tensor | None) -> Tensor:
    scores_BHLM = torch.einsum("bhlk,bhmk->bhlm", q_BHLK, k_BHMK) + bias_HLM
    if hidden_BLM is not None:
        scores_BHLM = scores_BHLM.masked_fill(hidden_BLM[:, None], float("-inf"))
    return torch.einsum("bhlm,bhmk->bhlk", scores_BHLM.softmax(-1), v_BHMK)
"""


@dataclass(frozen=True)
class Recipe:
    """heading: in CONTRIBUTING.md. new: files by path. changes: by path, a piece of text and what replaces it."""

    heading: str
    new: dict[str, str] = field(default_factory=dict)
    changes: dict[str, list[tuple[str, str]]] = field(default_factory=dict)


RECIPES = (
    Recipe(
        "An optimizer",
        changes={
            "lamda/config/schema.py": [("OptimizerName = Literal[", 'OptimizerName = Literal["sgd", ')],
            "lamda/engines/deepspeed/optimizer.py": [
                (
                    "    match train.optimizer:\n",
                    '    match train.optimizer:\n        case "sgd":\n'
                    "            return torch.optim.SGD(groups.values(), lr=0.0, momentum=train.beta1)\n",
                ),
                (
                    "    match optimizer:\n",
                    '    match optimizer:\n        case "sgd":\n'
                    '            return {"momentum_buffer": torch.zeros_like(like)}\n',
                ),
            ],
            "lamda/engines/param_groups.py": [
                (
                    "    match train.optimizer:\n",
                    '    match train.optimizer:\n        case "sgd":\n'
                    "            return dict.fromkeys(PARAM_GROUPS, 1.0)\n",
                )
            ],
            "lamda/cluster/memory.py": [
                (
                    "        match optimizer:\n",
                    '        match optimizer:\n            case "sgd":\n                kept += numel\n',
                )
            ],
        },
    ),
    Recipe(
        "An attention backend",
        new={"lamda/model/attention/einsum.py": EINSUM},
        changes={
            "lamda/config/schema.py": [('["math", "sdpa",', '["math", "einsum", "sdpa",')],
            "lamda/model/backend_choice.py": [('case "math" | "sdpa":', 'case "math" | "einsum" | "sdpa":')],
            "lamda/cluster/memory.py": [('        case "math":\n', '        case "math" | "einsum":\n')],
        },
    ),
    Recipe(
        "A metric",
        changes={
            "lamda/training/loggers.py": [('"lr": self.lr,', '"lr": self.lr, "inverse_lr": 1 / self.lr,')],
            "lamda/runs/panels.py": [
                ('Panel("Learning rate",', 'Panel("Inverse", ("inverse_lr",), "1 / rate"), Panel("Learning rate",')
            ],
        },
    ),
    Recipe(
        "A file format for text",
        changes={
            "lamda/data/file_formats.py": [
                ('FORMATS: dict[str, Records] = {\n', 'FORMATS: dict[str, Records] = {\n    ".records": "lines",\n'),
            ],
        },
    ),
    Recipe(
        "A command",
        new={"lamda/runs/greet.py": GREET},
        changes={
            "lamda/cli/__init__.py": [
                ("COMMANDS = {\n", 'COMMANDS = {\n    "greet": Command("lamda.runs.greet", "say hello"),\n'),
                ('"Your shell": (', '"Your shell": ("greet", '),
            ]
        },
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with the package after all recipes, and with the corpus cards."""
    folder = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "lamda", folder / "lamda", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", folder / "data")
    for recipe in RECIPES:
        for path, text in recipe.new.items():
            (folder / path).write_text(text, "utf-8")
        for path, changes in recipe.changes.items():
            for old, new in changes:
                text = (folder / path).read_text("utf-8")
                assert text.count(old) == 1, (recipe.heading, path, old)
                (folder / path).write_text(text.replace(old, new), "utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(copy):
    """A finished run of the copy with the new optimizer, attention backend, metric and file format."""
    lines = [json.dumps({"text": make_text(n, 200), "meta": {"pile_set_name": "speech"}}) for n in range(60)]
    (copy / "text.records.bz2").write_bytes(bz2.compress("\n".join(lines).encode()))
    (copy / "val.jsonl").write_text("\n".join(lines[:2]) + "\n", "utf-8")
    (copy / "run.yaml").write_text(SETTINGS, "utf-8")
    done = lamda(
        copy, "pretrain", "--config", "run.yaml", "--data.files", "text.records.bz2", "--data.eval_files", "val.jsonl",
        "--deepspeed.config", str(ROOT / "deepspeed/fp32.json"), "--run.dir", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return copy / "run"


def lamda(copy, *words):
    """`lamda WORDS`, of the copied package."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from lamda.cli import main; sys.exit(main())", *words],
        cwd=copy,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )


def section(heading):
    """The text below a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return re.split(r"^##+ ", text.split(f"\n### {heading}\n")[1], flags=re.MULTILINE)[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.heading)
def test_a_recipe_names_the_files_that_a_change_touches(recipe):
    named = section(recipe.heading)
    for path in recipe.changes:
        assert f"`{path}`" in named
    for path in recipe.new:
        assert any(f"`{folder}/NAME.py`" in named for folder in (Path(path).parent, "lamda/FOLDER"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.heading)
def test_a_recipe_names_nothing_that_is_gone(recipe):
    files = [
        word for word in re.findall(r"`([^`\s]+/[^`\s]+\.(?:py|md))`", section(recipe.heading)) if "NAME" not in word
    ]
    assert files
    assert [path for path in files if not (ROOT / path).is_file()] == []
    code = "".join((ROOT / path).read_text("utf-8") for path in files)
    names = re.findall(r"`(?:\w+\.)?(\w+)(?:\(\))?`", section(recipe.heading))
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_the_optimizer_and_the_attention_backend_train(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    manifest = json.loads(next(trained.glob("checkpoints/step-*/manifest.json")).read_text("utf-8"))
    assert any(name.startswith("optimizer") for name in manifest["files"])
    assert manifest["attention"] == "einsum"
    assert "attention: einsum" in (trained / "train.log").read_text("utf-8")


def test_the_metric_is_a_column_and_a_panel(trained):
    row = json.loads((trained / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert row["inverse_lr"] == pytest.approx(1 / row["lr"])
    report = lamda(trained.parent, "report", "run", "-o", "report.html")
    assert report.returncode == 0, report.stderr
    assert "Inverse" in (trained.parent / "report.html").read_text("utf-8")


def test_the_command_is_in_the_help_and_in_the_completion_and_reports_a_users_mistake(copy):
    assert "greet" in lamda(copy, "--help").stdout
    assert "greet" in lamda(copy, "completion", "bash").stdout
    assert lamda(copy, "greet", "--name", "Ada").stdout == "Hello, Ada\n"
    refused = lamda(copy, "greet")
    assert (refused.returncode, refused.stderr) == (2, "--name is empty: give a name\n")


def test_the_plan_knows_the_optimizer(copy):
    words = ("--config", str(ROOT / "configs/tiny.yaml"), "--deepspeed.config", str(ROOT / "deepspeed/fp32.json"))
    of = {name: lamda(copy, "plan", *words, "--train.optimizer", name, "--json") for name in ("sgd", "adamw")}
    assert [done.returncode for done in of.values()] == [0, 0], of
    assert of["sgd"].stdout != of["adamw"].stdout
