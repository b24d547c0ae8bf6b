"""The limit of open files of this process: many lanes or connections need more than the default of a shell."""

from __future__ import annotations

import resource


def allow_open_files(wanted: int) -> int:
    """Raise the limit of file descriptors to `wanted` if the system allows; returns the resulting limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return soft if soft != resource.RLIM_INFINITY else wanted
