"""One of two ranks of `test_parallelism.py`: trains a small LaMDA in DeepSpeed's other ways to shard.

Arguments: a folder, and a name in TRIALS; DeepSpeed keeps the groups of one way for the life of the process. Prints
one JSON object per trial: the differences from plain PyTorch on one rank, or the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from einops import rearrange
from torch import Tensor

from lamda import distributed
from lamda.config import ModelConfig
from lamda.model import LaMDA
from lamda.model.attention import Attention, math
from lamda.model.attention.bias import causal_buckets
from lamda.model.initialization import initialize_weights

STEPS, SAVED, B, L, H, K, V = 6, 3, 4, 16, 4, 8, 64
WORLD = distributed.read_world()
HALF = slice(WORLD.rank * L // 2, (WORLD.rank + 1) * L // 2)
HEADS = slice(WORLD.rank * H // 2, (WORLD.rank + 1) * H // 2)
SPECS = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.(query|key|value|gate|up)\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.(output|down)\.weight$"], "partition_type": "row"},
    ],
}
Losses = Callable[[Any, Tensor, Tensor], tuple[Tensor, float]]


class LocalHeads(Attention):
    """The heads of this rank, with their columns of the bias table; AutoTP has divided `n_heads`."""

    def forward(self, x_BLD: Tensor, view: Any) -> Tensor:
        q, k, v = (
            rearrange(matrix(x_BLD), "b l (h k) -> b h l k", h=self.n_heads)
            for matrix in (self.query, self.key, self.value)
        )
        return self.output(rearrange(view.attend(q, k, v, self.relative_bias[:, HEADS]), "b h l k -> b l (h k)"))


class LocalRows(Attention):
    """This rank's half of each row, exchanged for half of the heads by Ulysses."""

    exchange: UlyssesSPAttentionHF

    def forward(self, x_BLD: Tensor, view: Any) -> Tensor:
        q, k, v = (
            rearrange(matrix(x_BLD), "b l (h k) -> b h l k", h=H) for matrix in (self.query, self.key, self.value)
        )
        positions_BL = torch.arange(L)[HALF].repeat(B, 1)
        return self.output(self.exchange(self, q, k, v, None, position_ids=positions_BL)[0])


def local_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    bias_HLM = math.bias(module.relative_bias[:, HEADS], causal_buckets(128), queries=L, keys=L)
    return math.attend(q, k, v, bias_HLM, None).transpose(1, 2), None


def make_model(attention: type[Attention] = Attention) -> LaMDA:
    shape = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": H, "d_head": K, "d_ff": 64}
    model = LaMDA(ModelConfig(**shape, attention="math", bias_per_layer=True))
    initialize_weights(model, seed=3)
    for layer in model.layers:
        layer.attention.__class__ = attention
    return model


def optimizer(model: LaMDA) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)


def batch(step: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, V, (B, L + 1), generator=torch.Generator().manual_seed(step))
    return rows[:, :-1], rows[:, 1:]


def one_rank() -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    model, figures = make_model(), []
    adam = optimizer(model)
    for step in range(STEPS):
        inputs_BL, targets_BL = batch(step)
        loss = model(inputs_BL, targets_BL=targets_BL)[0].mean()
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        figures.append((loss.item(), norm.item()))
    return figures


def whole_rows(engine: Any, inputs_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, float]:
    loss = engine(inputs_BL, targets_BL=targets_BL)[0].mean()
    return loss, loss.item()


def half_rows(engine: Any, inputs_BL: Tensor, targets_BL: Tensor) -> tuple[Tensor, float]:
    """A rank's share of the loss; DeepSpeed sums gradients over the ranks of a row."""
    nll = engine(inputs_BL[:, HALF].contiguous(), targets_BL=targets_BL[:, HALF].contiguous())[0].sum() / (B * L)
    total = nll.detach().clone()
    dist.all_reduce(total)
    return nll, total.item()


def train(model: LaMDA, losses: Losses, *, stage: int, mpu: Any = None, **more: Any) -> dict[str, Any]:
    """Train, save, train on, resume, and train on again."""
    settings = {
        "train_micro_batch_size_per_gpu": B, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, **more,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer(model), config=settings, mpu=mpu, dist_init_required=False
    )

    def steps(first: int, last: int) -> list[tuple[float, float]]:
        figures = []
        for step in range(first, last):
            loss, shown = losses(engine, *batch(step))
            engine.backward(loss)
            engine.step()
            figures.append((shown, float(engine.get_global_grad_norm())))
        return figures

    folder = str(Path(sys.argv[1]) / f"{type(model.layers[0].attention).__name__}-{stage}")
    before = steps(0, SAVED)
    engine.save_checkpoint(folder, tag="saved")
    after = steps(SAVED, STEPS)
    engine.load_checkpoint(folder, tag="saved")
    pairs = list(zip(before + after, one_rank(), strict=True))
    tables = distributed.gather(model.layers[0].attention.relative_bias.detach().clone())
    return {
        "loss": max(abs(mine[0] - its[0]) for mine, its in pairs),
        "norm": median(mine[1] / its[1] for mine, its in pairs),
        "bias": float((tables[0] - tables[1]).abs().max()) if stage < 3 else None,
        "query": list(model.layers[0].attention.query.weight.shape),
        "resumes": steps(SAVED, STEPS) == after,
    }


def auto_tp(model: LaMDA, **partition: Any) -> dict[str, Any]:
    return train(model, whole_rows, stage=1, tensor_parallel={"autotp_size": 2, **partition})


def ulysses(stage: int) -> dict[str, Any]:
    LocalRows.exchange = UlyssesSPAttentionHF(
        local_attention, B, H, K, H, 2, parallel_state_sp.get_sequence_parallel_group(),
        local_seq_length=L // 2, global_seq_length=L,
    )  # fmt: skip
    return train(make_model(LocalRows), half_rows, stage=stage, mpu=parallel_state_sp)


def registered() -> dict[str, Any]:
    UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=make_model(), core_attn_implementation="sdpa", sequence_parallel_size=2, micro_batch_size=B
    )
    return {}


def by_key() -> dict[str, Any]:
    return train(make_model(), half_rows, stage=1, sequence_parallel_size=2, data_parallel_size=1)


TRIALS: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
    "Ulysses": {
        "registered": registered,
        "stage 1": lambda: ulysses(1),
        "stage 2": lambda: ulysses(2),
        "stage 3": lambda: ulysses(3),
        "keys alone": by_key,
    },
    "AutoTP": {
        "alone": lambda: auto_tp(make_model()),
        "layers named": lambda: auto_tp(make_model(), partition_config=SPECS),
        "local heads": lambda: auto_tp(make_model(LocalHeads), partition_config=SPECS),
    },
}

if __name__ == "__main__":
    distributed.start(WORLD, threads=1)
    for name, trial in TRIALS[sys.argv[2]].items():
        try:
            found = trial()
        except Exception as error:  # what DeepSpeed raises is the result
            found = {"error": f"{type(error).__name__}: {error}"}
        distributed.barrier()
        if WORLD.is_main_process:
            print(json.dumps({"trial": f"{sys.argv[2]}, {name}", **found}), flush=True)
