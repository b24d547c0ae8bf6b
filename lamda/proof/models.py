"""The model that is measured: the largest of those in `Sizes` that fits into memory, and its engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lamda import distributed
from lamda.cluster.memory import MemorySetting, peak
from lamda.cluster.zero import Sharding
from lamda.config import ds_config
from lamda.config.loading import load_config
from lamda.config.schema import Config, ModelConfig
from lamda.model.attention.backends import choose_backend
from lamda.model.initialization import draws, kind_of
from lamda.model.weights import weight_shapes
from lamda.proof.devices import device
from lamda.proof.sizes import Sizes

if TYPE_CHECKING:
    from lamda.engines.deepspeed.engine import DeepSpeedEngine

USABLE = 0.85
"""Share of a GPU's memory that a step may take by `lamda plan`'s count: matrices for the GEMM rate lie beside it."""


def choose_config(sizes: Sizes, length: int) -> Config:
    """The first model and the largest micro-batch that fit; else the last of both."""
    found = [_config(flags, sizes, length, micro) for flags in sizes.models for micro in sizes.micro_tokens]
    return next((config for config in found if _fits(config)), found[-1])


def attention(config: Config) -> str:
    """The attention backend of whole steps, in bf16."""
    model = config.model
    return choose_backend(model.attention, device(), dtype=torch.bfloat16, width=model.d_head, training=True)


def _config(flags: tuple[str, ...], sizes: Sizes, length: int, micro_tokens: int) -> Config:
    settings = {
        "train.steps": 1000,
        "data.sequence_length": length,
        "train.global_batch_size": max(1, sizes.step_tokens // length),
        "train.micro_batch_size": max(1, micro_tokens // length),
        "train.compile": "never",
        "wandb.mode": "disabled",
    }
    return load_config([*flags, *(f"--{key}={value}" for key, value in settings.items())])


def _fits(config: Config) -> bool:
    if not torch.cuda.is_available():
        return True
    settings = ds_config.build(config, world_size=1)
    sharding, accumulation = Sharding.of(settings, ranks=1), settings["gradient_accumulation_steps"]
    capability = torch.cuda.get_device_capability(device())
    needed = peak(MemorySetting.of(config, sharding, accumulation=accumulation, capability=capability))
    return needed <= USABLE * torch.cuda.get_device_properties(0).total_memory


def open_engine(config: Config) -> DeepSpeedEngine:
    """DeepSpeed's engine on this device alone, with weights as large as a run's initial ones, but drawn there.

    Those of the 2B would take most of a minute to draw on the host.
    """
    from lamda.engines.deepspeed.engine import DeepSpeedEngine
    from lamda.engines.deepspeed.initialization import fill_weights

    distributed.choose_accelerator()
    world = distributed.World()
    engine = DeepSpeedEngine(config, world=world, device=distributed.start(world, threads=config.run.threads))
    fill_weights(engine.deepspeed, _drawn_on(engine.device, config.model))
    return engine


def _drawn_on(device: torch.device, model: ModelConfig) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Every weight: name, first element, values [n]."""
    generator, by_kind = torch.Generator(device), draws(model)
    for name, shape in weight_shapes(model).items():
        yield name, 0, by_kind[kind_of(name)](torch.empty(shape, device=device), generator).view(-1)
