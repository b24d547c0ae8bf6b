"""Memory that is freed goes back to the operating system, where the C library is glibc."""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # of <malloc.h>
_ARENAS = 2


def share_arenas() -> None:
    """Call it before threads begin: with an arena for each request's thread, each keeps what it once took."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _ARENAS)


def give_back() -> None:
    """What large requests took on a CPU, and the allocator keeps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
