"""Train steps on a fake CUDA device: the code that a GPU would take, up to the kernels, whose fakes answer.

`run(cases)` starts a process, since the device stays for its life. A tensor there has a shape, a dtype and a device
but no memory, so that the largest presets take a step in a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamda.config.schema import Attention, Recompute

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).parent
ROWS, LENGTH = 2, 1024
CAPABILITY = (9, 0)
PARTITIONED = "aot_eager_decomp_partition"  # Inductor's decompositions and partition, without its code


@dataclass(frozen=True)
class Case:
    """A model of a preset with `layers` blocks, and how it computes; the backend in place of `auto` is in the result.

    compiled: blocks are compiled up to Inductor's partition into forward and backward; no code is made.
    """

    preset: str
    attention: Attention = "auto"
    recompute: Recompute = "none"
    compiled: bool = False
    documents: bool = False
    layers: int = 1


@dataclass(frozen=True)
class Step:
    """attention: the backend. saved: bytes of distinct tensors between forward and backward, without weights. graphs:
    compiled ones. breaks: reasons of graph breaks. mismatched: gradients that are unlike their weights."""

    attention: str
    saved: int
    graphs: int
    breaks: list[str]
    mismatched: list[str]


def run(cases: list[Case], folder: Path) -> dict[Case, Step]:
    """The step of each case. folder: for the built library."""
    library, source = folder / "fake_gpu.so", HERE / "fake_gpu.cpp"
    (spec,) = find_spec("torch").submodule_search_locations
    paths = [f"-I{spec}/include", f"-L{spec}/lib", f"-Wl,-rpath,{spec}/lib"]
    build = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(library), *paths, "-lc10", "-ltorch_cpu"]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    asked = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, "-m", "tests.model.fake_gpu", str(library)]
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(cases, (Step(**each) for each in found), strict=True))


def _step(case: Case) -> Step:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lamda.config import ModelConfig
    from lamda.model import LaMDA

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            config = ModelConfig(preset=case.preset, n_layers=case.layers, attention=case.attention)
            model = LaMDA(config, recompute=case.recompute)
        torch.set_default_dtype(torch.float32)
        if case.compiled:
            for block in model.layers:
                block.compile(dynamic=False, backend=PARTITIONED)
        ids_BL = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="cuda")
        known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, Any] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                saved[storage._cdata] = storage  # kept, so that no other takes its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            nll_BL, log_z_BL = model(ids_BL, ids_BL if case.documents else None, targets_BL=ids_BL)
            loss = (nll_BL + 1e-4 * log_z_BL.square()).sum()
        size = sum(storage.nbytes() for storage in saved.values())
        weights = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(weights.values()))
        unlike = [
            name
            for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            if (gradient.shape, gradient.dtype, gradient.device) != (weight.shape, weight.dtype, weight.device)
        ]
        return Step(model.attention, size, counters["stats"]["unique_graphs"], list(counters["graph_break"]), unlike)


def _norm_of_gpus(rows: torch.Tensor, shape: Sequence[int], scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Keeps what PyTorch's kernel for a GPU keeps; a build without CUDA takes the norm apart, and keeps wide copies.

    Inductor takes it apart on a GPU, too.
    """
    import torch

    from tests.cluster.storages import FusedNorm

    if torch.compiler.is_compiling():
        return torch.rms_norm(rows, shape, scale, eps)
    return FusedNorm.apply(rows, scale, eps)


def main(library: str) -> None:
    """Reads cases from standard input and prints their steps as one line of JSON."""
    ctypes.CDLL(library)  # before torch looks for an accelerator
    import torch

    from lamda.model.attention import flex

    torch.cuda.get_device_capability = lambda *_: CAPABILITY
    torch.nn.functional.rms_norm = _norm_of_gpus
    flex._compiled = lambda: torch.compile(flex.flex_attention, backend="aot_eager")
    cases = [Case(**each) for each in json.load(sys.stdin)]
    print(json.dumps([asdict(_step(case)) for case in cases]))


if __name__ == "__main__":
    main(sys.argv[1])
