"""Help and the saved configuration say everything that the schema holds."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamda.config import Config
from lamda.config.help import help_text, to_yaml
from lamda.config.loading import KEYS, load_config
from lamda.config.schema import COMPUTATION
from lamda.config.settings import choices, kind

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    ["null", "1e5", "off", "12", "2024-01-01", "~", "[a]", "# x", " a ", "a,b", "...", "1:30"]
)
PATHS = (
    "run.dir", "model.weights", "tokenizer.path", "data.cache_dir", "data.drop", "eval.tasks_path", "checkpoint.mirror",
)  # fmt: skip
PATH = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda path: path[0] != "~")
VALUES = {
    "number": st.floats(1e-300, 0.999),
    "boolean": st.booleans(),
    "text": TEXT,
    "list": st.lists(TEXT, min_size=1).map(tuple),
}


def lowest(field):
    """The field's own lower bound, 1 where it states none or a smaller one."""
    return max([1, *(bound.ge for bound in field.metadata if hasattr(bound, "ge"))])


def strategy(key, field):
    if key == "model.preset":
        return st.sampled_from(["tiny", "2b", "137b"])
    if key == "checkpoint.accept_changed":
        return st.lists(st.sampled_from(COMPUTATION), min_size=1).map(tuple)
    if key == "train.profile":
        return st.sampled_from([None, (1, 1), (3, 20)])
    if key in PATHS:
        return PATH
    if kind(field) == "integer":
        return st.integers(lowest(field), 2**70)
    return st.sampled_from(choices(field)) if kind(field) == "choice" else VALUES[kind(field)]


# Cross-checks bind these: one length, a micro-batch that divides the batch.
BOUND = ("train.steps", "train.tokens", "train.micro_batch_size")
FREE = {key: strategy(key, field) for key, field in KEYS.items() if key not in BOUND}


def test_help_lists_every_key_with_type_default_and_meaning():
    lines = help_text().splitlines()
    for key, field in KEYS.items():
        (line,) = [line for line in lines if line.split()[:1] == [f"--{key}"]]
        default = {"None": "-", "True": "true", "False": "false"}.get(str(field.default), str(field.default))
        assert line.split()[1:3] == [kind(field), default]
        assert field.description.split()[0] in line


def test_help_is_aligned_and_fits_100_columns():
    assert max(map(len, help_text().splitlines())) <= 100
    lines = [line for line in help_text().splitlines() if line.startswith("  --")]
    starts = {line.index(field.description.split()[0], 44) for line, field in zip(lines, KEYS.values(), strict=True)}
    assert len(starts) == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_a_shipped_config_survives_being_saved(path, tmp_path):
    config = load_config(["--config", str(path)])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), "utf-8")
    assert load_config(["--config", str(saved)]) == config


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.fixed_dictionaries({"train.steps": st.integers(1, 9)}, optional=FREE))
def test_any_config_survives_being_saved(tmp_path, chosen):
    values = {"train": {"micro_batch_size": 1}}
    for key, value in chosen.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    config = Config.model_validate(values)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config), "utf-8")
    assert load_config(["--config", str(saved)]) == config
    assert all(key in to_yaml(config) for key in ("preset", "gradient_clipping"))


def test_help_and_configuration_come_without_torch():
    script = (
        "import sys\n"
        "from lamda.cli import main\n"
        "for words in ('--help', 'pretrain -h', 'evaluate -h', 'plan -h', 'config show --train.steps 1'):\n"
        "    assert main(words.split()) == 0\n"
        "assert not {'torch', 'numpy', 'datasets', 'deepspeed'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"--{key} " in done.stdout for key in KEYS)
