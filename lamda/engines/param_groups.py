"""Learning rate and weight decay of each parameter group, and constants that both frameworks' optimizers share."""

from __future__ import annotations

from typing import assert_never

from lamda.config.schema import ModelConfig, TrainConfig
from lamda.model.weights import MATRIX_GROUPS, PARAM_GROUPS, ParamGroup

MUON_MOMENTUM = 0.95  # Muon's momentum, Nesterov (Jordan et al., kellerjordan.github.io/posts/muon)

ADAMW_RMS = 0.2  # the usual RMS of AdamW's updates, for Muon's (Liu et al., arXiv 2502.16982, section 2.2)


ADAFACTOR_EPS = (2.0**-63, 1e-3)
"""PyTorch's two epsilons of Adafactor.

The first bounds a row's mean square; its square, the least normal number of fp32, bounds the variance. So updates are
alike for gradients down to 1e-9, and a gradient of 0 changes nothing. PyTorch's default, fp32's resolution, stops
weights with gradients below 1e-7; the paper's 1e-30 has no square in fp32.
"""


def lr_multipliers(train: TrainConfig, model: ModelConfig) -> dict[ParamGroup, float]:
    """The factor between `train.lr` and the learning rate of each parameter group (docs/learning.md).

    The query's initial weights are 1/sqrt(K) times as large as the key's, in place of that factor in the attention
    scores, and an AdamW or Muon step moves all weights by the same amount: with the other matrices' rate, queries would
    change completely within a few steps. Norm scales and bias tables are few and large, and everything after them
    depends on them.

    With `train.base_width`, rates are scaled so that a step changes activations equally at every width (muP, arXiv
    2203.03466, at a constant width per head). A matrix sums D inputs, and an AdamW step moves all of their weights
    alike, so its rate falls as 1/D. The size of a Muon step is an operator norm and that of an Adafactor step a share
    of the weight, which leaves 1/sqrt(D). The tied embedding and the block norms keep their rates, as inputs do under
    muP. As an output the embedding needs logits times 1/D instead of the model's 1/sqrt(D): the final norm makes up
    for that.
    """
    width = model.d_model / (train.base_width or model.d_model)
    match train.optimizer:
        case "adamw":
            matrices = width**-1
        case "muon":
            matrices = width**-0.5
        case "adafactor":  # a step is a share of the weight, so other groups need no multiplier
            return dict.fromkeys(PARAM_GROUPS, 1.0) | dict.fromkeys(MATRIX_GROUPS, width**-0.5)
        case _:
            assert_never(train.optimizer)
    return {
        "embedding": train.embedding_lr_scale,
        "query": matrices * model.d_head**-0.5,
        "matrices": matrices,
        "norms": train.norm_lr_scale,
        "final_norm": train.norm_lr_scale * width**-0.5,
        "bias": train.bias_lr_scale,
    }


def weight_decays(train: TrainConfig, multipliers: dict[ParamGroup, float]) -> dict[ParamGroup, float]:
    """The weight decay of each parameter group, to be used with its own learning rate; only matrices decay.

    Dividing by the multiplier makes learning rate times weight decay the same for all matrices.
    """
    return {
        group: train.weight_decay / multiplier if group in MATRIX_GROUPS else 0.0
        for group, multiplier in multipliers.items()
    }
