"""GPUs by name: memory and peak rates of their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from lamda.config.errors import UserError, nearest
from lamda.storage.metrics import PEAK_FLOPS

RESERVE = 0.05
"""Share of a GPU's memory that CUDA's context, NCCL and fragmentation may take: an assumption, not a measurement."""


@dataclass(frozen=True)
class Device:
    """A GPU as sold: memory in 10^9 bytes; dense FLOP/s in bf16, and in fp32 without TF32."""

    name: str
    gigabytes: int
    bf16: float
    fp32: float

    @property
    def usable(self) -> int:
        """Bytes that a run may count on."""
        return round(self.gigabytes * 1e9 * (1 - RESERVE))

    def peak(self, *, is_bf16: bool) -> float:
        """FLOP/s of matrix products."""
        return self.bf16 if is_bf16 else self.fp32


DEVICES = {
    device.name: device
    for device in (
        Device("b200", 180, PEAK_FLOPS["B200"], 75e12),
        Device("h200", 141, PEAK_FLOPS["H200"], 67e12),
        Device("h100", 80, PEAK_FLOPS["H100"], 67e12),
        Device("a100-80", 80, PEAK_FLOPS["A100"], 19.5e12),
        Device("a100-40", 40, PEAK_FLOPS["A100"], 19.5e12),
        Device("l40s", 48, PEAK_FLOPS["L40S"], 91.6e12),
        Device("rtx4090", 24, PEAK_FLOPS["RTX 4090"], 82.6e12),
    )
}


def device_called(name: str) -> Device:
    """The GPU of that name. Raises UserError, which lists all."""
    if name not in DEVICES:
        raise UserError(f"--gpu: there is no {name!r} among {', '.join(DEVICES)}{nearest(name, DEVICES)}")
    return DEVICES[name]
