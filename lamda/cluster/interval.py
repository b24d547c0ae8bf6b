"""How often to save: the interval at which saving and what failures undo cost least together.

    sqrt(2 x seconds a save x seconds between failures)

Young, A first order approximation to the optimum checkpoint interval (1974); Daly's correction (2006) is far
below the uncertainty of the rate of failures.
"""

from __future__ import annotations

from math import sqrt

GPU_HOURS_A_FAILURE = 50_700
"""Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4)."""


def seconds_between_failures(gpus: int) -> float:
    """Mean, for that many GPUs and all that belongs to them."""
    return GPU_HOURS_A_FAILURE * 3600 / gpus


def best_interval(*, save_seconds: float, gpus: int) -> float:
    """Seconds from one save to the next."""
    return sqrt(2 * save_seconds * seconds_between_failures(gpus))


def lost_share(interval: float, *, save_seconds: float, gpus: int) -> float:
    """Share of the time that saving every `interval` seconds and computing again after failures take."""
    return save_seconds / interval + interval / (2 * seconds_between_failures(gpus))
