"""A step's time is that of the device, though the host is ahead of it: from fetch to fetch."""

from types import SimpleNamespace

import numpy as np
import pytest

from lamda.config.schema import Config
from lamda.config.stages import plan_stages
from lamda.data.loader import StepBatch
from lamda.distributed import World
from lamda.engines.protocol import StepMetrics
from lamda.storage.run_directory import RunDirectory
from lamda.storage.state import RunState
from lamda.training import loggers, trainer
from lamda.training.anomalies import AnomalyDetector
from lamda.training.stages import StagedInputs
from lamda.training.trainer import Trainer

STEP, FETCH, LAUNCH, LOG, EVALUATION = 2.0, 0.1, 0.2, 0.3, 50.0
"""Seconds of a device's step, and of what the host does."""


class Clock:
    def __init__(self):
        self.now, self.device_ends = 100.0, 0.0

    def monotonic(self):
        return self.now

    def launch(self):
        """Begin a step; returns a function that waits for its end."""
        self.now += LAUNCH
        self.device_ends = ends = max(self.now, self.device_ends) + STEP

        def wait():
            self.now = max(self.now, ends)
            return StepMetrics(np.array([[8.0], [8.0]]), 1.0, "0", (0, 0))

        return SimpleNamespace(wait=wait, skipped=False)


def a_trainer(folder, clock, rows, *, evaluated):
    """A run of six steps; the step `evaluated` is evaluated."""
    config = Config.model_validate(
        {"train": {"steps": 6, "global_batch_size": 2, "micro_batch_size": 2}, "data": {"sequence_length": 4}}
    )

    def log(metrics):
        rows.append(metrics)
        clock.now += LOG

    def evaluate(step, *, is_last):
        clock.now = max(clock.now, clock.device_ends) + EVALUATION * (step == evaluated)
        return {}

    engine = SimpleNamespace(
        config=config, world=World(), peak_flops=1e9, num_devices=1, train_step=lambda *_, **__: clock.launch()
    )
    profile = SimpleNamespace(begin=lambda step: None, end=lambda step: None)
    return Trainer(
        RunDirectory(folder),
        engine,
        StagedInputs(plan_stages(config), lambda stage: SimpleNamespace(domains=("a",))),
        SimpleNamespace(is_due=lambda step, *, is_last: step == evaluated, evaluate=evaluate),
        SimpleNamespace(completed_parts=0, advance=lambda parts: None),
        SimpleNamespace(profile=profile, log=log),
        SimpleNamespace(requests=SimpleNamespace(reason=lambda: None), mark=lambda *_, **__: None),
        RunState(),
    )


@pytest.mark.parametrize("evaluated", [None, 3])
def test_a_step_takes_as_long_as_the_device_needs_and_no_evaluation_counts(tmp_path, monkeypatch, evaluated):
    clock, rows = Clock(), []
    for module in (trainer, loggers):
        monkeypatch.setattr(module, "time", clock)
    run = a_trainer(tmp_path, clock, rows, evaluated=evaluated)
    run._anomalies = AnomalyDetector(run.config.train, [])
    run.save = lambda *_, **__: None
    if evaluated is None:  # then only steps are there to wait for
        run.evaluate = dict

    def batches():
        for _ in range(6):
            clock.now += FETCH
            yield StepBatch((), np.arange(2), np.zeros((2, 32), np.uint8), 2)

    began = clock.now
    run.train(batches())
    seconds = [row["step_seconds"] for row in rows]
    assert seconds[1:-1] == pytest.approx([STEP] * 4, abs=LAUNCH + FETCH + LOG)
    whole = clock.now - began - EVALUATION * (evaluated is not None)
    assert sum(seconds) == pytest.approx(whole, abs=2 * LOG), "no time is lost, and none is counted twice"
    assert rows[4]["tokens_per_second"] == pytest.approx(8 / seconds[4])
