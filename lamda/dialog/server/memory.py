"""Return freed memory to the operating system, with glibc."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # of <malloc.h>
_ARENAS = 2


def limit_arenas() -> None:
    """Share few malloc arenas among all threads; each arena keeps what it once took. Call before threads start."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def trim_memory() -> None:
    """Release memory that large requests took on a CPU and the allocator keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
