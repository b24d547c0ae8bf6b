"""Bytes of the tensors that are alive, counted as PyTorch makes and drops them."""

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

COLLECTIVES = {
    "c10d.allreduce_.default": "all-reduce",
    "c10d._allgather_base_.default": "all-gather",
    "c10d._reduce_scatter_base_.default": "reduce-scatter",
}


class Storages(TorchDispatchMode):
    """Counts storages as they come and go, and what collectives are given. Those of `known` tensors do not count."""

    def __init__(self, known=()):
        super().__init__()
        self.current = self.peak = 0
        self.sent = Counter()
        self._known = {each.untyped_storage()._cdata for each in known}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if str(operation) in COLLECTIVES:
            given = [sum(tensor.nbytes for tensor in tree_iter(each) if torch.is_tensor(tensor)) for each in args[:2]]
            self.sent[COLLECTIVES[str(operation)]] += max(given)
        out = operation(*args, **(kwargs or {}))
        for tensor in filter(_is_real, tree_iter(out)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known and storage.nbytes():
                self._known.add(key)
                self.current += storage.nbytes()
                self.peak = max(self.peak, self.current)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key, size):
        self._known.discard(key)
        self.current -= size


def _is_real(value) -> bool:
    return torch.is_tensor(value) and not value.is_meta


class FusedNorm(torch.autograd.Function):
    """Keeps what PyTorch's fused kernel keeps on a GPU, input and 1 / rms; its CPU path keeps wide copies as well."""

    @staticmethod
    def forward(ctx, x, scale, eps):
        inverse = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, inverse, scale)
        return (x * inverse).to(x.dtype) * scale

    @staticmethod
    def backward(ctx, gradient):
        x, _, scale = ctx.saved_tensors
        return gradient * scale, (gradient * x).sum((0, 1)), None
