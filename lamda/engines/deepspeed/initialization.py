"""How an engine starts: a model without weights, and later its initial weights, drawn into the fragments of each rank.

So no rank ever holds the whole model in fp32, unless it computes in fp32 below ZeRO stage 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import deepspeed
import torch

from lamda.config import ds_config
from lamda.config.schema import Config
from lamda.durable import Progress
from lamda.engines.deepspeed import fp8, lora
from lamda.engines.deepspeed.fragments import Fragment, fragments, publish_weights
from lamda.model import LaMDA


def empty_model(config: Config, settings: dict[str, Any], device: torch.device) -> LaMDA:
    """A model on the device in its final precision; its weights have no values yet. settings: DeepSpeed's.

    Raises UserError where `train.fp8` is not possible.
    """
    train = config.train
    if train.fp8:
        fp8.check(config.model, device)
    is_partitioned = ds_config.zero_stage(settings) == 3
    # zero.Init partitions each module's parameters as soon as they are made.
    with deepspeed.zero.Init(config_dict_or_path=settings) if is_partitioned else torch.device("meta"):
        model = LaMDA(config.model, recompute=train.recompute)
        if train.lora_rank:
            lora.adapt(model, rank=train.lora_rank)
    if not is_partitioned:
        model.to(torch.bfloat16 if ds_config.is_bf16(settings) else torch.float32).to_empty(device=device)
    if train.fp8:
        fp8.convert(model)
    return model


@torch.no_grad()
def fill_weights(
    engine: deepspeed.DeepSpeedEngine,
    pieces: Iterable[tuple[str, int, torch.Tensor]],
    *,
    progress: Progress = lambda: None,
) -> None:
    """Copy into this rank's fragments what they have of each (name, first element, values [n])."""
    by_name: dict[str, list[Fragment]] = {}
    for fragment in fragments(engine):
        by_name.setdefault(fragment.name, []).append(fragment)
    for name, start, values in pieces:
        for fragment in by_name.get(name, ()):
            first, weight = fragment.start, fragment.weight
            low, high = max(start, first), min(start + len(values), first + len(weight))
            if low < high:
                weight[low - first : high - first].copy_(values[low - start : high - start])
        progress()
    publish_weights(engine)
