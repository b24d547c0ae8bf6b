"""Memory that was freed, given back to the operating system."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Where the C library can: glibc keeps what large requests took on a CPU, in an arena for each thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
