"""A hundred steps of training, and steps that are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lamda.config.schema import Config
from lamda.engines.deepspeed.optimizer import make_optimizer as make_torch_optimizer
from lamda.engines.deepspeed.optimizer import set_learning_rate
from lamda.engines.flax.optimizer import make_optimizer
from lamda.engines.flax.sharding import make_mesh
from lamda.engines.flax.step import Batch, Step, TrainState, make_step
from lamda.engines.flax.weights import make_weights
from lamda.model import LaMDA
from lamda.model.initialization import initial_weights, initialize_weights
from lamda.training.lr_schedule import learning_rate

STEPS, ROWS, LENGTH, VOCABULARY = 100, 4, 24, 61
CONFIG = Config(
    model={"vocab_size": VOCABULARY, "d_model": 24, "n_layers": 2, "n_heads": 3, "d_head": 8, "d_ff": 40},
    data={"sequence_length": LENGTH},
    train={
        "steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": ROWS // 2, "lr": 1e-2, "warmup_steps": 5,
        "weight_decay": 0.1, "gradient_clipping": 0.5, "base_width": 12,
    },
)  # fmt: skip


def rows(step: int) -> np.ndarray:
    """[2, b, L+1]: a text that can be learned."""
    starts = np.random.default_rng(step).integers(VOCABULARY, size=(2, ROWS // 2, 1))
    return ((starts + np.arange(LENGTH + 1) * 7) % VOCABULARY).astype(np.int32)


def compiled(dtype: jnp.dtype) -> tuple[Step, TrainState]:
    mesh = make_mesh(CONFIG.flax, CONFIG.model)
    own = initial_weights(CONFIG.model, seed=1, base_width=CONFIG.train.base_width)
    drawn = {name: each.draw() for name, each in own.items()}
    weights = make_weights(CONFIG.model, lambda name, index: drawn[name].numpy()[index], dtype=dtype)
    optimizer = make_optimizer(CONFIG.train, CONFIG.model)
    state = TrainState(weights, optimizer.init(weights))
    return make_step(CONFIG, optimizer, state=state, mesh=mesh, dtype=dtype, domains=1), state


def batch_of(ids: np.ndarray) -> Batch:
    shape = ids[..., 1:].shape
    return Batch(jnp.asarray(ids), jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32), None)


def torch_losses() -> list[float]:
    model = LaMDA(CONFIG.model).double()
    initialize_weights(model, seed=1, base_width=CONFIG.train.base_width)
    optimizer = make_torch_optimizer(model, CONFIG.train)
    losses = []
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate(step + 1, train=CONFIG.train, steps=STEPS))
        ids_BL = torch.from_numpy(rows(step)).long().flatten(0, 1)
        nll_BL, log_z_BL = model(ids_BL[:, :-1], targets_BL=ids_BL[:, 1:])
        (nll_BL + CONFIG.train.z_loss * log_z_BL.square()).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nll_BL.mean().item())
    return losses


@pytest.mark.usefixtures("in_float64")
def test_a_hundred_steps_in_float64_are_those_of_pytorch_and_one_that_is_not_finite_changes_nothing():
    step, state = compiled(jnp.float64)
    losses = []
    for number in range(STEPS):
        rate = learning_rate(number + 1, train=CONFIG.train, steps=STEPS)
        state, output = step(state, batch_of(rows(number)), jnp.float64(rate))
        assert output.updated
        losses.append(float(output.sums[0, 0] / output.sums[1, 0]))
    expected = torch_losses()
    assert expected[-1] < expected[0] / 2
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-9)

    scale = state.weights["final_norm.scale"]
    spoiled = TrainState({**state.weights, "final_norm.scale": scale.at[3].set(jnp.inf)}, state.optimizer)
    before = jax.tree.map(np.array, spoiled)
    state, output = step(spoiled, batch_of(rows(0)), jnp.float64(1e-2))
    assert not output.updated
    jax.tree.map(np.testing.assert_array_equal, state, before)
