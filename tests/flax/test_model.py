"""The JAX model against the independent reference and against the PyTorch model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lamda.config import ModelConfig
from lamda.engines.flax.bias import bias_at, row_bias
from lamda.engines.flax.weights import Weights, bind, load_weights, make_weights, plain_weights
from lamda.model import LaMDA
from lamda.model.attention import bias as reference
from lamda.model.initialization import initialize_weights
from tests.model.conftest import GoldenCase, golden  # noqa: F401 - a fixture

Losses = tuple[jax.Array, tuple[jax.Array, jax.Array]]


def test_buckets_are_those_of_the_pytorch_model_at_every_distance():
    table_RH, distances_BLM = jnp.arange(32.0)[:, None], jnp.arange(100_000)[None, None]
    buckets = bias_at(table_RH, distances_BLM, longest=100_000).squeeze()
    assert buckets.tolist() == reference.causal_buckets(100_000).tolist()


@pytest.mark.parametrize("length", [1, 2, 17, 130])
def test_bias_of_rows_is_the_table_at_each_distance(length):
    table_RH = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    buckets = reference.causal_buckets(length)
    expected = reference.relative_bias(torch.from_numpy(table_RH), buckets, queries=length)
    assert np.array_equal(row_bias(jnp.asarray(table_RH), length), expected)


@pytest.mark.parametrize(
    ("golden", "recompute"),
    [("bias-per-layer", "none"), ("bias-shared", "ffn"), ("documents", "block")],
    indirect=["golden"],
)
@pytest.mark.usefixtures("in_float64")
def test_logits_losses_and_every_gradient_equal_the_reference(golden: GoldenCase, recompute):  # noqa: F811
    arrays = {name: jnp.asarray(tensor.numpy()) for name, tensor in golden.tensors.items()}
    weights = _weights(golden.config, golden.under("weights/"), jnp.float64)
    tokens_BL, documents_BL = arrays["tokens"], arrays.get("documents")
    loss_mask_BL = jnp.ones(tokens_BL[:, 1:].shape)
    if documents_BL is not None:
        loss_mask_BL = (documents_BL[:, 1:] == documents_BL[:, :-1]).astype(float)
        documents_BL = documents_BL[:, :-1]

    def losses(weights: Weights) -> Losses:
        model = bind(golden.config, weights, recompute=recompute)
        nll_BL, log_z_BL = model.losses(tokens_BL[:, :-1], tokens_BL[:, 1:], documents_BL)
        loss = (nll_BL * loss_mask_BL).sum() / loss_mask_BL.sum()
        z_loss = 1e-4 * (log_z_BL**2 * loss_mask_BL).sum() / loss_mask_BL.sum()
        return loss + z_loss, (loss, z_loss)

    (_, (loss, z_loss)), gradients = jax.jit(jax.value_and_grad(losses, has_aux=True))(weights)
    logits_BLV = jax.jit(lambda weights: bind(golden.config, weights)(tokens_BL[:, :-1], documents_BL))(weights)

    close(logits_BLV, arrays["logits"])
    close(loss, arrays["loss"].squeeze())
    close(z_loss, arrays["z_loss"].squeeze())
    expected = golden.under("gradients/")
    compared = dict(plain_weights(gradients))
    assert set(compared) == set(expected)
    for name, gradient in compared.items():
        close(gradient, expected[name].numpy())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "bias_per_layer"),
    [("float64", 1e-9, True), ("float32", 1e-5, True), ("float32", 1e-5, False), ("bfloat16", 0.05, True)],
)
def test_logits_and_gradients_are_those_of_the_pytorch_model_of_the_same_file(
    tmp_path, dtype, tolerance, bias_per_layer
):
    config = ModelConfig(
        vocab_size=97, d_model=64, n_layers=3, n_heads=4, d_head=16, d_ff=128, bias_per_layer=bias_per_layer
    )
    model = LaMDA(config).to(getattr(torch, dtype))
    initialize_weights(model, seed=3)
    save_file(model.export_weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    ids_BL = torch.randint(97, (2, 41), generator=torch.Generator().manual_seed(0))
    documents_BL = torch.tensor([[0] * 15 + [1] * 25, [0] * 40])
    nll_BL, log_z_BL = model(ids_BL[:, :-1], documents_BL, targets_BL=ids_BL[:, 1:])
    (nll_BL.mean() + 1e-4 * log_z_BL.square().mean()).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}

    with jax.enable_x64(dtype == "float64"):
        weights = load_weights(tmp_path / "model.safetensors", config)
        ids, documents = jnp.asarray(ids_BL.numpy()), jnp.asarray(documents_BL.numpy())

        def loss(weights: Weights) -> tuple[jax.Array, jax.Array]:
            network = bind(config, weights)
            nll_BL, log_z_BL = network.losses(ids[:, :-1], ids[:, 1:], documents)
            return nll_BL.mean() + 1e-4 * jnp.square(log_z_BL).mean(), network(ids[:, :-1], documents)

        gradients, logits_BLV = jax.jit(jax.grad(loss, has_aux=True))(weights)
        assert logits_BLV.dtype == dtype
        found = {name: np.asarray(gradient, np.float64) for name, gradient in plain_weights(gradients)}
        near(np.asarray(logits_BLV, np.float64), model(ids_BL[:, :-1], documents_BL), tolerance)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        near(gradient, expected[name], tolerance)


def near(actual: np.ndarray, expected: torch.Tensor, tolerance: float) -> None:
    np.testing.assert_allclose(actual, expected.detach().double().numpy(), rtol=0, atol=tolerance)


def close(actual: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-9)


def _weights(config: ModelConfig, plain: dict[str, torch.Tensor], dtype: object) -> Weights:
    return make_weights(config, lambda name, index: plain[name].numpy()[index], dtype=dtype)
