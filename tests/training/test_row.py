"""A step's row adds up: what belongs to one name stands under it once."""

from types import SimpleNamespace

import numpy as np
import pytest

from lamda.config.schema import Config
from lamda.engines.protocol import StepMetrics
from lamda.storage.state import RunState
from lamda.training.loggers import FinishedStep

PARTS = {("a", "other"): [(2.0, 10), (3.0, 50), (9.0, 1)], ("a", "b"): [(2.0, 10), (3.0, 50), (9.0, 1)]}


def row_of(domains, parts, **train):
    sums = np.array([[loss * count for loss, count in parts], [count for _, count in parts]], np.float64)
    result = SimpleNamespace(wait=lambda: StepMetrics(sums, 1.0, "0", ()), skipped=False)
    config = Config.model_validate(
        {"data": {"sequence_length": 32}, "train": {"steps": 9, "global_batch_size": 8, **train}}
    )
    finished = FinishedStep(
        RunState(step=1, updates=1), result, lr=0.1, began=5.0, data_wait_seconds=0.0, save_seconds=0.0
    )
    finished.end(7.0)
    engine = SimpleNamespace(config=config, peak_flops=None, num_devices=1)
    return finished.metrics(engine, domains)


@pytest.mark.parametrize("domains", PARTS)
def test_tokens_and_nats_by_domain_are_those_of_all_targets(domains):
    parts = PARTS[domains]
    row = row_of(domains, parts)
    names = [name.removeprefix("loss/") for name in row if name.startswith("loss/")]
    assert sum(row[f"tokens/{name}"] for name in names) == 61
    assert sum(row[f"tokens/{name}"] * row[f"loss/{name}"] for name in names) == pytest.approx(20 + 150 + 9)


def test_a_domain_called_other_is_reported_with_the_names_that_are_not_known():
    row = row_of(("a", "other"), PARTS["a", "other"])
    assert (row["tokens/other"], row["loss/other"]) == (51, pytest.approx(159 / 51))
