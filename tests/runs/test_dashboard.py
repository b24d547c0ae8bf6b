"""The workspace in W&B shows every metric of a run once, in the order in which a person watches it."""

from __future__ import annotations

import json
import re

import pytest
import wandb

from lamda.cli import main
from lamda.config.help import to_yaml
from lamda.config.schema import Config
from lamda.runs.dashboard import build, specification
from lamda.runs.panels import GROUPS, PANELS, panel_of
from tests.wandb_run import environment, forgotten
from tests.wandb_server import WandbServer

COLUMNS = {
    "loss": "Training loss", "loss/FreeLaw": "Training loss by domain", "lr": "Learning rate",
    "tokens_per_second": "Throughput", "mfu": "MFU", "model_flops_per_second": "Model FLOPs",
    "step_seconds": "Step time",
    "data_wait_seconds": "Data wait", "tokens/FreeLaw": "Tokens by domain", "grad_norm": "Gradient norm",
    "skipped_steps": "Skipped steps", "rollbacks": "Skipped steps", "save_seconds": "Checkpoint stall time",
    "eval/loss": "Held-out loss", "eval/bits_per_byte": "Held-out bits per byte",
    "eval/loss/FreeLaw": "Held-out loss by domain", "eval/perplexity": "Perplexity of responses",
    "eval/hellaswag/acc": "Tasks and ratings", "eval/gsm8k/exact_match/strict-match": "Tasks and ratings",
    "eval/auc/sensible": "Tasks and ratings", "eval/lambada_openai/perplexity": "Tasks and ratings",
    "eval/losses/acc": "Tasks and ratings",
}  # fmt: skip
"""Every column that a run may write, but the axes and the digest."""


@pytest.fixture(autouse=True)
def alone():
    with forgotten():
        yield


@pytest.fixture
def panels():
    """(section, panel's configuration) as W&B would get them."""
    content = specification(build(entity="e", project="p"))["section"]["panelBankConfig"]["sections"]
    return [(section["name"], panel["config"]) for section in content for panel in section["panels"]]


def test_sections_stand_in_the_order_in_which_a_person_watches_a_run(panels):
    order = list(dict.fromkeys(section for section, _ in panels))
    assert order == ["Loss", "Throughput", "Data", "Health", "Checkpoints", "Evaluation", "System"]


@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_shown_once_and_in_the_catalogues_panel(panels, column):
    found = [
        config["chartTitle"]
        for _, config in panels
        if column in config["metrics"] or (config.get("metricRegex") and re.search(config["metricRegex"], column))
    ]
    assert found == [panel_of(column).title] == [COLUMNS[column]]
    assert [panel.title for panel in PANELS if panel.of([column])] == found


@pytest.mark.parametrize(
    "column", ["step", "tokens", "samples", "batch_digest", "eval/full/loss", "eval/full/loss/FreeLaw"]
)
def test_axes_digests_and_the_last_evaluation_of_all_the_text_are_no_curves(panels, column):
    assert panel_of(column) is None
    patterns = [config["metricRegex"] for _, config in panels if config.get("metricRegex")]
    assert not any(re.search(pattern, column) for pattern in patterns)


def test_patterns_are_such_as_a_server_without_look_ahead_matches(panels):
    assert not [config["metricRegex"] for _, config in panels if "(?" in config.get("metricRegex", "")]


def test_curves_lie_over_tokens_and_the_machines_own_over_time(panels):
    for section, config in panels:
        assert config["xAxis"] == ("_runtime" if section == "System" else "tokens"), config["chartTitle"]
    machine = [name for section, config in panels if section == "System" for name in config["metrics"]]
    assert {"system/gpu.0.gpu", "system/gpu.7.memoryAllocated", "system/cpu", "system/network.recv"} <= set(machine)


def test_a_run_tells_the_project_and_flags_win(tmp_path, capsys):
    config = Config(train={"steps": 1}, wandb={"project": "ours", "entity": "team"})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert main(["dashboard", str(tmp_path), "--dry-run"]) == 0
    message = capsys.readouterr().out
    assert message.startswith("team/ours: workspace 'LaMDA'")
    assert [line for line in message.splitlines()[1:] if not line.startswith(" ")][:-1] == [
        each.title for each in GROUPS
    ]
    assert main(["dashboard", str(tmp_path), "--project", "theirs", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["section"]["panelBankConfig"]["sections"]) == 7
    assert main(["dashboard"]) == 2
    assert "--project P" in capsys.readouterr().err


def test_the_workspace_is_sent_to_w_and_b(tmp_path, capsys, monkeypatch):
    with WandbServer() as server:
        own = {**environment(tmp_path), "WANDB_API_KEY": "k" * 40, "WANDB_BASE_URL": server.url}
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        assert main(["dashboard", "--project", "p", "--entity", "e"]) == 0, capsys.readouterr().err
        (view,) = server.views
    assert (view["projectName"], view["entityName"], view["displayName"]) == ("p", "e", "LaMDA")
    sent = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert sent[0]["name"] == "Loss"
    assert "/e/p?nw=" in capsys.readouterr().out


def test_w_and_b_that_does_not_take_it_is_reported_with_what_to_do(capsys, monkeypatch):
    def without_key():
        raise wandb.errors.AuthenticationError("no W&B key: set WANDB_API_KEY, or run `wandb login`")

    monkeypatch.setattr("lamda.training.wandb_logger.sign_in", without_key)
    assert main(["dashboard", "--project", "p"]) == 2
    message = capsys.readouterr().err
    assert "no W&B key: set WANDB_API_KEY" in message
    assert "`lamda report` needs no account" in message
