"""LaMDA's recipe without some of its parts (docs/learning.md): what each gives alone, and what it gives last.

PARTS has them by name. Without all of them a model is trained as in the project's first release, which had its query,
key and value and its gate and up matrices packed, so that only Muon and Adafactor differed by that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lamda.config.schema import Config, TrainConfig
from lamda.model.initialization import generator

ADAMW_RATE = 2e-3
"""AdamW's best rate for the sizes of `learning.yaml`, with the scales that are `train`'s defaults."""

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """What undoes a part of the recipe, in place.

    train: keys of `train`. start: a weight, given its name. group: a group of the optimizer, given a name in it.
    """

    train: Callable[[TrainConfig], Mapping[str, Any]] = field(default=lambda _: {})
    start: Callable[[str, Tensor, Config], object] = field(default=lambda *_: None)
    group: Callable[[str, dict[str, Any], Config], object] = field(default=lambda *_: None)


def _to_adamw(train: TrainConfig) -> dict[str, Any]:
    scales = ("embedding_lr_scale", "norm_lr_scale", "bias_lr_scale")
    defaults = {key: TrainConfig.model_fields[key].default for key in scales}
    return {"optimizer": "adamw", "lr": ADAMW_RATE, **defaults}


def _larger_outputs(name: str, weight: Tensor, config: Config) -> None:
    if name.endswith(("output.weight", "down.weight")):
        weight.mul_((2 * config.model.n_layers) ** 0.5)


def _random_tables(name: str, weight: Tensor, config: Config) -> None:
    if name.endswith("relative_bias"):
        weight.normal_(0.0, weight.numel() ** -0.5, generator=generator(config.run.seed, name))


def _rate_of_a_matrix(name: str, group: dict[str, Any], config: Config) -> None:
    if name.endswith("query.weight"):
        factor = config.model.d_head**0.5
        group["lr_multiplier"] *= factor
        group["weight_decay"] /= factor


def _decaying_embedding(name: str, group: dict[str, Any], config: Config) -> None:
    if name == "embedding.weight":
        group["weight_decay"] = config.train.weight_decay


PARTS: Mapping[str, Part] = {
    "muon": Part(train=_to_adamw),
    "query-rate": Part(group=_rate_of_a_matrix),
    "residual-start": Part(start=_larger_outputs),
    "bias-start": Part(start=_random_tables),
    "bias-rate": Part(train=lambda _: {"bias_lr_scale": 1.0}),
    "norm-rate": Part(train=lambda _: {"norm_lr_scale": 1.0}),
    "embedding-rate": Part(train=lambda train: {"embedding_lr_scale": train.embedding_lr_scale / 2}),
    "embedding-decay": Part(group=_decaying_embedding),
    "beta2": Part(train=lambda _: {"beta2": 0.95}),
    "z-loss": Part(train=lambda _: {"z_loss": 0.0}),
}
"""The first one sets rates that others change."""


def label(removed: Collection[str]) -> str:
    """The record's words for a recipe without these parts."""
    kept = [part for part in PARTS if part not in removed]
    if len(kept) < len(removed):
        return f"only {', '.join(kept)}" if kept else "none of the parts"
    return f"without {', '.join(part for part in PARTS if part in removed)}"


def configured(config: Config, removed: Collection[str]) -> Config:
    """The configuration without these parts, as far as keys of `train` say it."""
    for name, part in PARTS.items():
        if name in removed:
            config = config.model_copy(update={"train": config.train.model_copy(update=part.train(config.train))})
    return config


@torch.no_grad()
def undo(module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, removed: Collection[str]) -> None:
    """Take these parts from the initial weights and the optimizer of LaMDA."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for part in (PARTS[name] for name in removed):
        for parameter, name in names.items():
            part.start(name, parameter, config)
        for group in optimizer.param_groups:
            part.group(names[group["params"][0]], group, config)
