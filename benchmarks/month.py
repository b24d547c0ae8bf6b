"""Simulation of a month of training, with the failure rate of Llama 3 and one preemption per day, from measured times.

Effective time is spent on steps that are kept. The rest is lost to stalls by saves, repeated steps, detection of
failures, and restarts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from dataclasses import asdict, dataclass

GPU_HOURS_PER_FAILURE = 54 * 24 * 16_384 / 419
"""Llama 3 405B: 419 unplanned interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783, section 3.3.4)."""
HOUR, DAY = 3600.0, 86_400.0


@dataclass(frozen=True)
class Times:
    """Seconds, measured on the system in question.

    interval: training between checkpoints. stall: pause of training for a save. save: until it is complete. start: from
    launch to the first new step, with loading. detect: until a failure ends the run. queue: until the scheduler
    restarts it.
    """

    interval: float
    stall: float
    save: float
    start: float
    detect: float
    queue: float


def simulate(times: Times, *, gpus: int, days: int = 30, seed: int = 0) -> dict[str, float]:
    """Share of time spent on kept steps, and the seconds of each kind of loss."""
    draw = random.Random(seed)
    clock, since_save, next_preemption = 0.0, 0.0, DAY
    mean = GPU_HOURS_PER_FAILURE * HOUR / gpus if gpus else math.inf
    spent = {"kept": 0.0, "stalled": 0.0, "lost steps": 0.0, "down": 0.0}
    failures = preemptions = 0
    next_failure = draw.expovariate(1.0) * mean
    while clock < days * DAY:
        event = min(next_failure, next_preemption, days * DAY)
        while clock + times.interval - since_save + times.stall <= event:
            spent["kept"] += times.interval
            spent["stalled"] += times.stall
            clock += times.interval - since_save + times.stall
            since_save = 0.0
        since_save += max(0.0, event - clock)
        clock = event
        if event == next_failure:
            failures += 1
            # An unfinished save is lost: the previous one is the newest.
            torn = times.interval if since_save < times.save and spent["kept"] else 0.0
            spent["kept"] -= torn
            spent["lost steps"] += since_save + torn
            down = times.detect + times.queue + times.start
            next_failure = clock + down + draw.expovariate(1.0) * mean
        else:
            preemptions += event == next_preemption
            spent["kept"] += since_save
            down = (times.save + times.queue + times.start) if event == next_preemption else 0.0
            next_preemption += DAY if event == next_preemption else 0.0
        since_save = 0.0
        clock += down
        spent["down"] += down
    whole = sum(spent.values())
    return {"effective": spent["kept"] / whole, "failures": failures, "preemptions": preemptions, **spent}


def main(argv: list[str]) -> int:
    """`--gpus N --interval S --stall S --save S --start S --detect S --queue S [--json]`."""
    parser = argparse.ArgumentParser(prog="benchmark.py month", allow_abbrev=False)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--months", type=int, default=100, help="simulated months, each with a seed of its own")
    for name in Times.__dataclass_fields__:
        parser.add_argument(f"--{name}", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    times = Times(**{name: getattr(options, name) for name in Times.__dataclass_fields__})
    months = [simulate(times, gpus=options.gpus, seed=seed) for seed in range(options.months)]
    mean = {name: sum(month[name] for month in months) / len(months) for name in months[0]}
    worst = min(month["effective"] for month in months)
    if options.json:
        print(json.dumps({"times": asdict(times), "gpus": options.gpus, "mean": mean, "worst_month": worst}, indent=1))
    else:
        print(f"{mean['effective']:.2%} of the time counts (worst of {len(months)} months: {worst:.2%})")
        for name in ("failures", "preemptions"):
            print(f"  {name}: {mean[name]:.1f} a month")
        for name in ("stalled", "lost steps", "down"):
            print(f"  {name}: {mean[name] / HOUR:.2f} hours a month")
    return 0
