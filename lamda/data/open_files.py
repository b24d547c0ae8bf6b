"""How many files a process may have open: many lanes, or many connections, take more than a shell allows at first."""

from __future__ import annotations

import resource


def allow_open_files(wanted: int) -> int:
    """File descriptors that this process may have, after asking for as many as are wanted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft if soft != resource.RLIM_INFINITY else wanted
