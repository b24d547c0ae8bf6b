"""What is published, as a stranger gets it: built, installed into an empty environment, and run from an empty folder.

Versions are those of constraints.txt (`make package-test`; minutes, and it downloads what pip has not cached).
"""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from lamda import __version__

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--train.steps", "2", "--train.warmup_steps", "1", "--tokenizer.train_bytes", "300000"),
    *("--eval.batches", "1", "--eval.full_batches", "1", "--model.n_layers", "1", "--wandb.mode", "offline"),
)


def run(*command, cwd, code=0):
    """Standard output of a command, none of whose packages or settings come from this suite's environment."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "WANDB"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=own, capture_output=True, text=True)
    assert done.returncode == code, (
        f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The source archive, and the wheel that was built from it."""
    folder = Path(os.environ.get("LAMDA_DIST") or tmp_path_factory.mktemp("dist"))
    folder.mkdir(exist_ok=True)
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=tmp_path_factory.mktemp("build"))
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def environment(built, tmp_path_factory):
    """The folder of an environment's programs that holds the wheel and what it needs, nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    run(folder / "bin/pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", built[1], cwd=folder)
    return folder / "bin"


def test_both_archives_are_named_after_the_one_version(built):
    assert [path.name for path in built] == [
        f"lamda_pytorch-{__version__}.tar.gz",
        f"lamda_pytorch-{__version__}-py3-none-any.whl",
    ]


def test_the_wheel_holds_the_package_and_its_resources_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    assert {name.partition("/")[0] for name in names} == {"lamda", f"lamda_pytorch-{__version__}.dist-info"}
    assert built[1].stat().st_size < 1_000_000
    here = subprocess.run(["git", "ls-files", "lamda"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    of_package = {name for name in names if name.startswith("lamda/") and not name.startswith("lamda/_resources/")}
    assert of_package == set(here.split())
    for folder in ("configs", "data", "deepspeed"):
        for path in (ROOT / folder).rglob("*.*"):
            assert f"lamda/_resources/{path.relative_to(ROOT)}" in names


def test_the_source_archive_holds_what_the_wheel_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "configs/tiny.yaml"} <= names
    assert "data/pile.yaml" in names


def test_the_metadata_has_the_extras_and_a_description(built):
    with zipfile.ZipFile(built[1]) as wheel:
        text = wheel.read(f"lamda_pytorch-{__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "lamda-pytorch"
    assert {"flax", "serve", "dev", "docs", "plot"} <= set(metadata.get_all("Provides-Extra"))
    assert "Open LaMDA pre-trains, fine-tunes and serves" in metadata.get_payload()


def test_an_empty_environment_has_all_that_is_needed(environment, tmp_path):
    assert "No broken requirements" in run(environment / "pip", "check", cwd=tmp_path)
    assert run(environment / "lamda", "--version", cwd=tmp_path).strip() == __version__


def test_import_takes_less_than_a_fifth_of_a_second(environment, tmp_path):
    code = "import time; began = time.perf_counter(); import lamda; print(time.perf_counter() - began)"
    assert float(run(environment / "python", "-c", code, cwd=tmp_path)) < 0.2


def test_configurations_and_cards_come_with_the_package(environment, tmp_path):
    assert "preset: tiny" in run(environment / "lamda", "config", "show", "--config", "tiny", cwd=tmp_path)
    for path in (ROOT / "configs").glob("*.yaml"):
        run(environment / "lamda", "config", "show", "--config", path.stem, cwd=tmp_path)
    message = run(environment / "lamda", "config", "show", "--config", "tinny", cwd=tmp_path, code=2)
    assert "did you mean 'tiny'?" in message


def test_a_model_is_trained_and_used_without_the_repository(environment, tmp_path):
    message = run(environment / "lamda", "pretrain", "--config", "tiny", *SMALL, cwd=tmp_path)
    assert "everything is in runs/tiny" in message
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == "finished"
    assert "finished" in run(environment / "lamda", "runs", "runs", cwd=tmp_path)
    continued = run(
        environment / "lamda",
        "generate",
        "runs/tiny",
        "--prompt",
        "import",
        "--max-new-tokens",
        4,
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(continued[continued.index("{") :])


def test_a_run_without_wandb_says_so_and_ends_well(environment, tmp_path):
    run(environment / "pip", "uninstall", "--yes", "--quiet", "wandb", cwd=tmp_path)
    message = run(environment / "lamda", "pretrain", "--config", "tiny", *SMALL, cwd=tmp_path)
    assert message.count("W&B is not installed") == 1
    assert json.loads((tmp_path / "runs/tiny/status.json").read_text())["status"] == "finished"
