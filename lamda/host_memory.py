"""What glibc does with freed memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # of <malloc.h>
_ARENAS = 2


def limit_arenas() -> None:
    """Share few malloc arenas among all threads; each arena keeps what it once took. Call before threads start."""
    _set(_ARENA_MAX, _ARENAS)


def keep_memory() -> None:
    """Keep freed memory: else large blocks are returned, and every step on a CPU faults their pages in again.

    Only for steps: what a start frees has other sizes and would stay unused.
    """
    for option, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
        _set(option, value)


def trim_memory() -> None:
    """Return all freed memory to the operating system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)
