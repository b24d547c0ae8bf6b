"""A step waits for the device only where DeepSpeed reads something back, and never more often than docs/performance.md
says. Counted on a CPU, where the same calls are made: those that read a number, and our own that copy."""

import sys
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lamda.config import Config
from lamda.distributed import World
from lamda.engines.deepspeed.engine import DeepSpeedEngine
from tests.distributed.engine_worker import batch, config

READS = {"item", "tolist", "cpu", "nonzero", "is_nonzero", "equal", "__bool__", "__float__", "__int__", "__index__"}
COPIES = {"to", "cuda", "copy_", "tensor", "as_tensor", "scalar_tensor"}


class ScalarReads(TorchDispatchMode):
    """Counts the numbers that anybody reads from a tensor: on a GPU each waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class OwnCalls(TorchFunctionMode):
    """Counts the engine's own calls that wait on a GPU: reads, and copies that are not `non_blocking`."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.copies_after_forward = 0
        self.has_begun = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if "/lamda/engines/" in sys._getframe(1).f_code.co_filename:
            is_waiting_copy = name in COPIES and not kwargs.get("non_blocking")
            self.calls[name] += name in READS or is_waiting_copy
            self.copies_after_forward += self.has_begun and name in COPIES
        return func(*args, **kwargs)

    def on_phase(self, phase, tensor):
        self.has_begun |= phase == "forward"


def engine_of(folder, device, *, stage, bf16, layers=2):
    own = config({"stage": stage, "bf16": bf16}, folder, 0).model_dump(exclude_unset=True)
    engine = DeepSpeedEngine(
        Config.model_validate({**own, "model": own["model"] | {"n_layers": layers}}), world=World(), device=device
    )
    engine.initialize_weights()
    return engine


def scalar_reads(engine, on_phase=lambda phase, tensor: None):
    engine.train_step(batch(0, World()), lr=1e-3).wait()
    with ScalarReads() as reads:
        engine.train_step(batch(1, World()), lr=1e-3, on_phase=on_phase)
    return reads.count


@pytest.mark.parametrize(("stage", "bf16", "reads"), [(1, True, 2), (0, True, 12), (0, False, 1), (1, False, 7)])
def test_a_step_reads_as_many_numbers_from_the_device_as_documented(tmp_path, device, stage, bf16, reads):
    counts = [scalar_reads(engine_of(tmp_path, device, stage=stage, bf16=bf16, layers=layers)) for layers in (1, 3)]
    assert counts == [reads, reads]


def test_a_read_more_is_counted(tmp_path, device):
    engine = engine_of(tmp_path, device, stage=1, bf16=True)
    assert scalar_reads(engine, lambda phase, tensor: phase == "loss" and tensor.item()) == 2 + 4


def test_the_engine_itself_copies_before_the_forward_pass_and_reads_nothing(tmp_path, device):
    engine = engine_of(tmp_path, device, stage=1, bf16=True)
    engine.train_step(batch(0, World()), lr=1e-3).wait()
    with OwnCalls() as own:
        step = engine.train_step(batch(1, World()), lr=1e-3, counters=[3], on_phase=own.on_phase)
    assert +own.calls == Counter(), "these wait for the device"
    assert own.copies_after_forward == 0
    with OwnCalls() as own:
        assert step.wait().counters == [3.0]
    assert +own.calls == Counter(), "metrics are read from where they were copied to"


def test_a_read_of_the_engine_itself_is_seen(tmp_path, device):
    """In fp32 without ZeRO it looks at the norm, because DeepSpeed does not."""
    engine = engine_of(tmp_path, device, stage=0, bf16=False)
    with OwnCalls() as own:
        engine.train_step(batch(0, World()), lr=1e-3)
    assert +own.calls == Counter({"__bool__": 1})
