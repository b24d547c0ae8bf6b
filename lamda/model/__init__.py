"""The decoder, its initialization, loss and counts.

`LaMDA` is imported on first use, so that `lamda.model.counts` costs no import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamda.model.decoder import LaMDA

__all__ = ["LaMDA"]


def __getattr__(name: str) -> type[LaMDA]:
    if name != "LaMDA":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lamda.model.decoder import LaMDA

    return LaMDA
