"""A train step of each preset on a fake GPU, eager and compiled; and what it saves beside what `lamda plan` counts."""

from __future__ import annotations

import shutil
from itertools import product

import pytest

from lamda.cluster.memory import RECOMPUTE, MemorySetting, activations
from lamda.cluster.zero import Sharding
from lamda.config import ModelConfig
from lamda.config.presets import PRESETS
from tests.model import fake_gpu
from tests.model.conftest import needs_kernels
from tests.model.fake_gpu import Case

pytestmark = [needs_kernels, pytest.mark.skipif(not shutil.which("g++"), reason="the fake device needs g++")]

BACKENDS = ("math", "sdpa", "flex", "fused", "split")
OF_PRESETS = [Case(preset, compiled=compiled, documents=True) for preset in PRESETS for compiled in (False, True)]
SAVED = [
    *(Case("110m", *how, layers=2) for how in product(BACKENDS, RECOMPUTE, (False, True))),
    *(Case("110m", backend, documents=True, layers=2) for backend in BACKENDS),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return fake_gpu.run(OF_PRESETS + SAVED, tmp_path_factory.mktemp("fake_gpu"))


@pytest.mark.parametrize("case", OF_PRESETS, ids=str)
def test_a_step_of_each_preset_takes_the_path_of_a_gpu(steps, case):
    """With the backend of `auto`, its operators' fakes and, compiled, one graph for the block without a break."""
    step = steps[case]
    assert step.attention == "fused"
    assert step.graphs == int(case.compiled)
    assert (step.breaks, step.mismatched) == ([], [])


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_what_is_kept_is_what_autograd_saves(steps, case):
    step = steps[case]
    sharding = Sharding(stage=1, ranks=1, weight=2, accumulated=4, sent=4)
    config = ModelConfig(preset=case.preset, n_layers=case.layers)
    how = (config, step.attention, sharding, fake_gpu.ROWS, fake_gpu.LENGTH, 1, case.recompute)
    planned = activations(MemorySetting(*how, has_documents=case.documents, is_compiled=case.compiled))
    # `lamda plan` counts the logits apart. If something is recomputed, they are, too.
    logits = fake_gpu.ROWS * fake_gpu.LENGTH * config.vocab_size * 2 if case.recompute == "none" else 0
    assert planned.kept == pytest.approx(step.saved - logits, rel=0.01)
    assert (step.breaks, step.mismatched) == ([], [])
