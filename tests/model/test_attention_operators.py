"""What a compiled step is told of the attention operators is what they do: schema, shapes, strides, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lamda.model.attention import sdpa
from lamda.model.attention.bias import BAND
from tests.conftest import DEVICE
from tests.model.conftest import needs_kernels

pytestmark = needs_kernels

B, H, L, K = 2, 3, 5, 16
Arguments = tuple[Any, ...]


def _inputs(dtype: torch.dtype, *, documents: bool) -> tuple[Arguments, torch.Tensor, torch.Tensor | None]:
    """q, k and v as views of one projection, the band, and the ids of documents or none."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(B, L, 3, H, K, generator=generator).to(DEVICE, dtype)
    band = torch.randn(H, BAND, generator=generator).to(DEVICE)
    ids = (torch.arange(L, dtype=torch.int32, device=DEVICE) // 31).expand(B, L).contiguous() if documents else None
    return packed.permute(2, 0, 3, 1, 4).unbind(), band, ids


def _kernels(dtype: torch.dtype, documents: bool) -> dict[str, Arguments]:
    from lamda.model.attention import kernel_ops

    (q, k, v), band, ids = _inputs(dtype, documents=documents)
    out, lse = kernel_ops.band_attention(q, k, v, band, ids, False)
    d_out = torch.ones(B, H, L, K, dtype=dtype, device=DEVICE)
    return {
        "band_attention": (q, k, v, band, ids, False),
        "band_attention_backward": (d_out, q, k, v, band, ids, out, lse, False),
        "band_gradient": (d_out, q, k, v, band, ids, out, lse),
    }


def _sdpa(dtype: torch.dtype, documents: bool) -> dict[str, Arguments]:
    views, band, ids = _inputs(dtype, documents=documents)
    q, k, v = (each.contiguous() for each in views)
    hidden = None if ids is None else ids[:, :, None] != ids[:, None, :]
    d_out = torch.ones(B, H, L, K, dtype=dtype, device=DEVICE)
    return {
        "sdpa_attention": (q, k, v, band, hidden),
        "sdpa_attention_backward": (d_out, q, k, v, band, hidden),
    }


def _plain(dtype: torch.dtype, documents: bool) -> dict[str, Arguments]:
    from lamda.model.attention.split import plain_attention

    on_gpu = DEVICE.type == "cuda"  # whose kernels take 16 bits alone
    (q, k, v), *_ = _inputs(torch.bfloat16 if on_gpu else dtype, documents=documents)
    out, lse = plain_attention(q, k, v)
    return {"plain_attention": (q, k, v), "plain_attention_backward": (torch.ones_like(out), q, k, v, out, lse)}


FAMILIES: dict[Callable[..., dict[str, Arguments]], list[str]] = {
    _kernels: ["band_attention", "band_attention_backward", "band_gradient"],
    _sdpa: ["sdpa_attention", "sdpa_attention_backward"],
    _plain: ["plain_attention", "plain_attention_backward"],
}


def test_every_operator_of_the_project_is_checked():
    from lamda.model.attention import kernel_ops, split

    assert {kernel_ops, split, sdpa}, "imported, and so registered"
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("lamda::")}
    assert {name.removeprefix("lamda::").partition(".")[0] for name in registered} == {
        name for names in FAMILIES.values() for name in names
    }


@pytest.mark.parametrize(("dtype", "documents"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.strip("_"))
def test_an_operator_is_what_its_schema_and_its_fake_say(family, dtype, documents):
    for name, arguments in family(dtype, documents).items():
        torch.library.opcheck(
            getattr(torch.ops.lamda, name).default, arguments, test_utils=("test_schema", "test_faketensor")
        )
