"""Every way of computing attention against `math` in float64: outputs and all gradients.

Without a GPU the Triton kernels run in Triton's interpreter (tests/model/conftest.py); with one the
same cases run on it, and larger ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lamda.config.errors import UserError
from lamda.model.attention import sdpa
from lamda.model.attention.backends import backend_for, choose_backend
from lamda.model.attention.bias import BAND, causal_buckets
from lamda.model.backend_choice import Target, choose, obstacle, resolve
from tests.conftest import DEVICE
from tests.model.conftest import needs_kernels

if find_spec("triton") is not None:
    from lamda.model.attention import kernel_ops

BACKENDS = ["sdpa", pytest.param("fused", marks=needs_kernels), pytest.param("split", marks=needs_kernels)]
if DEVICE.type == "cuda":
    BACKENDS.append("flex")

Shape = tuple[int, int, int, int]

# Rows, heads, length, width: shorter than the band, a band and one, and many tiles; primes but for batch.
SHAPES: list[Shape] = [(2, 3, 23, 7), (1, 1, 129, 5), (2, 3, 307, 13)]
if DEVICE.type == "cuda":
    SHAPES += [(1, 1, 129, 16), (2, 5, 1031, 64), (1, 3, 2048, 128)]


def runs(way: str, shape: Shape, dtype: torch.dtype) -> bool:
    """Whether the device's kernels take it; a CPU's take all."""
    if DEVICE.type == "cpu":
        return True
    target = Target(torch.cuda.get_device_capability(), dtype.itemsize, shape[-1])
    return obstacle(way, target, training=True) is None


def pairs(shapes: list[Shape], dtype: torch.dtype) -> list[Any]:
    """Each way with each shape that it takes."""
    ways = {way if isinstance(way, str) else way.values[0]: way for way in BACKENDS}
    return [
        pytest.param(name, shape, marks=() if isinstance(way, str) else way.marks)
        for name, way in ways.items()
        for shape in shapes
        if runs(name, shape, dtype)
    ]


@dataclass(frozen=True)
class Case:
    q_BHLK: Tensor
    k_BHLK: Tensor
    v_BHLK: Tensor
    table_RH: Tensor
    d_out_BHLK: Tensor
    documents_BL: Tensor | None

    @classmethod
    def random(
        cls,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        documents: str = "none",
        sharpness: int = 1,
        steepness: int = 1,
    ) -> Case:
        """Float64 values that `dtype` holds exactly; q, k and v views of one projection, as the model has them.

        sharpness, steepness: powers of 2 that multiply the scores and the bias.
        """
        B, H, L, K = shape
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        packed, table, d_out = (
            each.to(dtype).double() for each in (K**-0.25 * draw(B, L, 3, H, K), draw(32, H), draw(B, L, H, K))
        )
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
        ids = {"none": None, "runs": torch.arange(L) // 41, "returning": torch.arange(L) // 29 % 3}[documents]
        ids = None if ids is None else ids.expand(B, L).contiguous()
        return cls(sharpness * q, k, v, steepness * table, d_out.transpose(1, 2), ids)

    def run(self, way: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients, in float64 on the CPU."""
        names = ("q_BHLK", "k_BHLK", "v_BHLK", "table_RH")
        inputs = [getattr(self, name).to(DEVICE, dtype).detach().requires_grad_() for name in names]
        out = attention(way, *inputs, self.documents_BL)
        assert out.dtype == dtype
        gradients = torch.autograd.grad(out, inputs, self.d_out_BHLK.to(DEVICE, dtype))
        return {name: each.double().cpu() for name, each in zip(("out", *names), (out, *gradients), strict=True)}


def attention(way: str, q: Tensor, k: Tensor, v: Tensor, table_RH: Tensor, documents_BL: Tensor | None) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    backend = backend_for(way)
    buckets_N = causal_buckets(max(keys, BAND), device=q.device)
    bias = backend.bias(table_RH, buckets_N, queries=queries, keys=keys)
    tokens_BL = torch.empty(q.shape[0], queries, dtype=torch.long, device=q.device)
    documents_BL = None if documents_BL is None else documents_BL.to(q.device)
    return backend.attend(q, k, v, bias, backend.mask(tokens_BL, documents_BL))


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The norm of the difference by that of the exact value."""
    return {name: ((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact}


@pytest.mark.parametrize("documents", ["none", "runs", "returning"])
@pytest.mark.parametrize(("way", "shape"), pairs(SHAPES, torch.float32), ids=str)
def test_float32_gives_output_and_gradients_of_math_in_float64(way, shape, documents):
    case = Case.random(shape, torch.float32, documents=documents)
    found = errors(case.run(way, torch.float32), case.run("math", torch.float64))
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("documents", ["none", "returning"])
@pytest.mark.parametrize(("way", "shape"), pairs(SHAPES[1:], torch.bfloat16), ids=str)
def test_bf16_is_no_worse_than_twice_math(way, shape, documents):
    assert_no_worse_than_twice_math(way, Case.random(shape, torch.bfloat16, documents=documents))


@pytest.mark.parametrize(("way", "shape"), pairs(SHAPES[2:3] + SHAPES[4:5], torch.bfloat16), ids=str)
def test_bf16_is_no_worse_than_twice_math_at_large_scores(way, shape):
    """Of 100 and more, which bf16 rounds to halves: a model's grow so in training."""
    assert_no_worse_than_twice_math(way, Case.random(shape, torch.bfloat16, sharpness=32))


def assert_no_worse_than_twice_math(way: str, case: Case) -> None:
    exact = case.run("math", torch.float64)
    allowed = {name: 2 * error for name, error in errors(case.run("math", torch.bfloat16), exact).items()}
    found = errors(case.run(way, torch.bfloat16), exact)
    assert all(found[name] <= allowed[name] for name in found), (found, allowed)


@pytest.mark.parametrize("large", [{}, {"sharpness": 32}, {"steepness": 32}], ids=str)
@pytest.mark.parametrize("widened", [("cpu",), ()], ids=["by the kernel", "as on a GPU"])
def test_sdpa_keeps_large_biases_and_gives_a_gpu_no_mask_of_another_dtype(monkeypatch, widened, large):
    """A bias of 32 and more, which bf16 rounds to quarters. A CPU can compute as a GPU does."""
    kernel = functional.scaled_dot_product_attention

    def strict(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        assert attn_mask.dtype == q.dtype or q.device.type in sdpa.KERNEL_WIDENS_MASK
        return kernel(q, k, v, attn_mask=attn_mask, scale=scale)

    monkeypatch.setattr(sdpa, "KERNEL_WIDENS_MASK", widened)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", strict)
    for documents in ("none", "returning"):
        case = Case.random((2, 3, 307, 13), torch.bfloat16, documents=documents, **large)
        assert_no_worse_than_twice_math("sdpa", case)
        assert case.run("sdpa", torch.float32)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("way", BACKENDS[:2])
def test_a_models_logits_and_gradients_are_those_of_math(way, model, documents):
    """With a table a layer, and with one that all layers share: its gradient adds up over them."""
    on_gpu = DEVICE.type == "cuda"  # whose kernels take no float64
    model.to(DEVICE, torch.float32 if on_gpu else torch.float64)
    bound = 1e-4 if on_gpu else 1e-9
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(0, 53, (1, 150), generator=generator).to(DEVICE)
    documents_BL = (torch.arange(150).expand(1, -1) // 31).to(DEVICE) if documents else None
    found = {}
    for each in ("math", way):
        model.config = model.config.model_copy(update={"attention": each})
        logits = model(tokens_BL, documents_BL)
        gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()))
        found[each] = {"logits": logits, **dict(zip(dict(model.named_parameters()), gradients, strict=True))}
    for name, exact in found["math"].items():
        torch.testing.assert_close(found[way][name], exact, rtol=bound, atol=bound * exact.abs().max().item(), msg=name)


@needs_kernels
@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has its own tiles")
def test_the_tiles_of_smaller_gpus_give_the_same(monkeypatch):
    """The interpreter takes Hopper's; elsewhere a walk's steps and the band's tiles are smaller."""
    tiles = kernel_ops.tiles_for((8, 0), element_size=2)
    monkeypatch.setattr(kernel_ops, "_tiles", lambda _: tiles)
    case = Case.random((1, 1, 133, 5), torch.float32, documents="returning")
    found = errors(case.run("fused", torch.float32), case.run("math", torch.float64))
    assert max(found.values()) < 1e-5, found


GPU = Target(capability=(9, 0), element_size=2, width=128)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fused"), ({"width": 8}, "fused"), ({"capability": (8, 0)}, "fused"), ({"capability": (12, 0)}, "fused"),
        ({"element_size": 4}, "flex"), ({"element_size": 4, "width": 8}, "sdpa"), ({"element_size": 8}, "sdpa"),
        ({"width": 256}, "sdpa"), ({"capability": (7, 5)}, "sdpa"), ({"missing": "a C compiler"}, "sdpa"),
        ({"capability": None}, "sdpa"), ({"capability": None, "interpreted": True}, "sdpa"),
    ],
)  # fmt: skip
def test_auto_is_the_fastest_backend_that_can_train_there(changes, name):
    target = replace(GPU, **changes)
    assert choose(target) == name
    assert obstacle(name, target, training=True) is None


@pytest.mark.parametrize(
    ("way", "changes", "message"),
    [
        ("fused", {"capability": None}, r"fused: its kernels need a GPU; `auto` is `sdpa` here"),
        ("fused", {"capability": (7, 5)}, r"compute capability 8\.0 or newer, and this one's is 7\.5"),
        ("fused", {"width": 256}, r"model\.d_head of up to 128 in 16 or 32 bits, not 256 in 16"),
        ("fused", {"element_size": 8}, r"in 16 or 32 bits, not 128 in 64"),
        ("split", {"missing": "the package triton"}, r"split: its kernels need the package triton"),
        (
            "split",
            {"element_size": 4},
            r"take 16 bits and a model\.d_head of 8, .* not 128 in 32; `auto` is `flex`",
        ),
        ("split", {"width": 12}, r"not 12 in 16; `auto` is `fused` here"),
        ("flex", {"width": 8}, r"flex: on a GPU it takes a model\.d_head of 16 and more, not 8"),
        ("flex", {"capability": None}, r"flex: FlexAttention has no backward pass on the CPU"),
        ("flex", {"width": 256}, r"up to 128"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_by_name(way, changes, message):
    with pytest.raises(UserError, match=message):
        resolve(way, replace(GPU, **changes), training=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a model on the CPU")
def test_a_model_computes_with_the_backend_of_its_own_device_and_precision(monkeypatch, model):
    assert model.config.attention == "auto"
    assert model.attention == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("lamda.model.attention.backends._is_interpreted", lambda: False)
    monkeypatch.setattr("lamda.model.attention.backends.missing_for_triton", lambda: None)
    choices = {
        dtype: choose_backend("auto", torch.device("cuda"), dtype=dtype, width=128)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    }
    assert [*choices.values()] == ["fused", "flex", "sdpa"]
    model.config = model.config.model_copy(update={"attention": "flex"})
    with pytest.raises(UserError, match="FlexAttention has no backward pass on the CPU"):
        model(torch.zeros(1, 3, dtype=torch.long))
    with torch.no_grad():
        assert model.attention == "flex"


@pytest.mark.parametrize("way", BACKENDS)
def test_a_bucket_that_no_distance_falls_into_has_no_gradient(way):
    """Not even rounding errors: Adam would move it by a full step."""
    if not runs(way, (2, 3, 23, 16), torch.float32):
        pytest.skip(f"{way} does not train on this device")
    gradient_RH = Case.random((2, 3, 23, 16), torch.float32).run(way, torch.float32)["table_RH"]
    used = causal_buckets(23).max() + 1
    assert gradient_RH[:used].abs().min() > 0
    assert torch.equal(gradient_RH[used:], torch.zeros_like(gradient_RH[used:]))


@pytest.mark.parametrize(("way", "shape"), pairs(SHAPES[1:2] + SHAPES[3:4], torch.float32), ids=str)
def test_gradients_are_the_same_bit_for_bit_every_time(way, shape):
    """Of `split` on a CPU alone: the backward pass of a GPU's plain kernels adds up with atomics."""
    case = Case.random(shape, torch.float32)
    one, other = (case.run(way, torch.float32) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("documents", ["none", "returning"])
def test_flex_gives_maths_output_without_gradients_on_every_device(documents):
    case = Case.random((2, 3, 307, 16), torch.float32, documents=documents)
    inputs = [each.to(DEVICE, torch.float32) for each in (case.q_BHLK, case.k_BHLK, case.v_BHLK, case.table_RH)]
    with torch.no_grad():
        found, exact = (attention(way, *inputs, case.documents_BL) for way in ("flex", "math"))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
