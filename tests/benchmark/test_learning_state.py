"""Interrupted runs of `benchmark.py learning`."""

import pytest

from benchmarks import learning_state
from benchmarks.learning_peers import make_learner
from benchmarks.learning_runs import run
from tests.benchmark.test_learning import CPU, rows  # noqa: F401

STEPS = 40


@pytest.mark.parametrize("model", ["lamda", "nanochat"])
def test_an_interrupted_run_ends_as_an_unbroken_one(model, rows, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(learning_state, "EVERY", 0.0)

    def train(state, stop_at=None):
        def on_progress(step, *_):
            steps.append(step)
            if step == stop_at:
                raise KeyboardInterrupt

        steps = []
        learner = make_learner(model, rows.config, rate=0.01, device=CPU.device)
        return run(learner, rows, CPU, seed=0, steps=STEPS, state=state, on_progress=on_progress), steps

    whole, _ = train(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "state.pt", stop_at=30)
    continued, steps = train(tmp_path / "state.pt")
    assert steps == [30, 40]  # the state is of step 20
    assert {**continued, "seconds": 0} == {**whole, "seconds": 0}
    assert not list(tmp_path.glob("*.pt"))
