"""The kernels' code: that of Inductor around them, and their own for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED
from tests.model.conftest import needs_kernels
from tests.model.test_compiled_attention import CASES
from tests.model.test_kernel_resources import run_kernel_resources

ROOT = Path(__file__).parents[2]

COMPILED = """
import sys
from tests.conftest import DEVICE
from tests.model.test_compiled_attention import model_of, step
from lamda.engines.deepspeed.compile import compile_blocks

way, length, documents = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
model = model_of(way)
compile_blocks(model)
expected, found = (step(each, length, documents=documents) for each in (model_of("math"), model))
for exact, other in zip(expected, found, strict=True):
    assert (other - exact).float().norm() <= 2e-2 * exact.float().norm()
"""


@needs_kernels
@pytest.mark.parametrize(("way", "length", "documents"), [case for case in CASES if case[0] != "flex"])
def test_a_block_compiled_by_inductor_gives_the_logits_and_gradients_of_math(way, length, documents):
    """Its code asserts the strides that an operator's fake told it."""
    arguments = [sys.executable, "-c", COMPILED, way, str(length), str(documents)]
    subprocess.run(arguments, cwd=ROOT, env={**os.environ, **INTERPRETED}, check=True, timeout=900)


@needs_kernels
def test_every_kernel_is_within_the_limits_of_every_gpu():
    """All variants and devices; `tests/model/test_kernel_resources.py` has those that need most."""
    done = run_kernel_resources()
    assert done.returncode == 0, done.stdout + done.stderr
