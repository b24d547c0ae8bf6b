"""Learning rates and weight decay of each part of the model, and constants that both frameworks' optimizers share."""

from __future__ import annotations

from typing import get_args

from lamda.config.schema import ModelConfig, TrainConfig
from lamda.model.weights import ParamGroup

PARTS: tuple[ParamGroup, ...] = get_args(ParamGroup)

MUON_MOMENTUM = 0.95  # Muon's momentum, Nesterov (Jordan et al., kellerjordan.github.io/posts/muon)

ADAMW_RMS = 0.2  # the usual RMS of AdamW's updates, for Muon's (Liu et al., arXiv 2502.16982, section 2.2)


ADAFACTOR_EPS = (2.0**-63, 1e-3)
"""PyTorch's two epsilons of Adafactor.

The first bounds a row's mean square; its square, the least normal number of fp32, bounds the variance. So updates are
alike for gradients down to 1e-9, and a gradient of 0 changes nothing. PyTorch's default, fp32's resolution, stops
weights with gradients below 1e-7; the paper's 1e-30 has no square in fp32.
"""


def rate_scales(train: TrainConfig, model: ModelConfig) -> dict[ParamGroup, float]:
    """The learning rate of each part of the model / the run's (docs/learning.md has the gain of each).

    A query's weights begin 1/sqrt(K) times as large as a key's, in place of that factor in the scores, and an AdamW or
    Muon step moves all weights by the same: at the matrices' rate queries would turn over within a few steps.
    Scales of norms and bias tables are few and large, and an input to everything after them.

    With `train.base_width` rates keep the size of what a step changes the same at every width (muP, arXiv
    2203.03466; heads keep theirs). A matrix adds up D inputs that an AdamW step moves alike, so its rate falls as
    1/D; Muon's and Adafactor's steps have a size of their own, an operator's norm and a share of the weight, which
    leave 1/sqrt(D). The tied embedding and the scales before it keep theirs as inputs; as outputs they
    ask for logits times 1/D instead of the model's 1/sqrt(D), which the final norm takes on.
    """
    width = model.d_model / (train.base_width or model.d_model)
    matrices = width**-1 if train.optimizer == "adamw" else width**-0.5
    if train.optimizer == "adafactor":  # its steps are a share of what they move
        return dict.fromkeys(PARTS, 1.0) | {"query": matrices, "matrices": matrices}
    return {
        "embedding": train.embedding_lr_scale,
        "query": matrices * model.d_head**-0.5,
        "matrices": matrices,
        "norms": train.norm_lr_scale,
        "final_norm": train.norm_lr_scale * width**-0.5,
        "bias": train.bias_lr_scale,
    }


def weight_decays(train: TrainConfig, scales: dict[ParamGroup, float]) -> dict[ParamGroup, float]:
    """The decay of each part at the run's rate times its scale; only the blocks' matrices have any.

    The part's rate scale does not change the decay: rate times decay is the same for all matrices.
    """
    decayed = ("query", "matrices")
    return {part: train.weight_decay / scale if part in decayed else 0.0 for part, scale in scales.items()}
