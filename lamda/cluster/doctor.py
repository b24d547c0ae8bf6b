"""`lamda doctor`: whether a run would work here. Under a launcher all ranks look, and the odd one is named."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from statistics import median

from lamda.cluster.checks.finding import LEVELS, Check, Finding, Level, Subject, failure, warning
from lamda.config.errors import RunError, UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.distributed import World, choose_accelerator, read_world

EXITS: Mapping[Level, int] = {"ok": 0, "warning": 1, "failure": 2}
SLOW_SHARE = 0.8
"""Of the others' rate: a rank below it holds all of them up."""


def parser() -> ConfigParser:
    """The options of `lamda doctor`."""
    parser = ConfigParser("lamda doctor", epilog="exit code: 0 if all is well, 1 with warnings, 2 with failures")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def main(argv: list[str]) -> int:
    """`[--json] [--config FILE] [--section.key VALUE ...]`, the tiny run by default.

    0 all well, 1 warnings, 2 failures. Raises UserError.
    """
    options, flags = parser().parse_known_args(argv)
    if not any(flag.partition("=")[0] == "--config" for flag in flags):
        flags = ["--config", "tiny", *flags]
    config, world = load_config(flags), read_world()
    choose_accelerator()
    import torch

    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    subject = Subject(config, world, device)
    findings = alone(subject) if world.size == 1 else together(subject)
    worst = max((finding.level for finding in findings.values()), key=LEVELS.index)
    if world.is_main:
        print(as_json(worst, findings) if options.json else as_text(findings), flush=True)
    _leave(world)
    return EXITS[worst]


def checks() -> list[Check]:
    """Everything that a rank can look at by itself, in the order of telling."""
    from lamda.cluster.checks import environment, hardware, software

    return [*software.CHECKS, *hardware.CHECKS, *environment.CHECKS]


def alone(subject: Subject) -> dict[str, Finding]:
    """What one process finds."""
    return {check.name: run(check, subject) for check in checks()}


def together(subject: Subject) -> dict[str, Finding]:
    """What all ranks find, on every rank."""
    from lamda import distributed
    from lamda.cluster.checks import ranks

    world = subject.world
    distributed.start(world, threads=1)
    places = distributed.gather(f"rank {world.rank} (host {socket.gethostname()})")
    own = {check.name: run(check, subject) if _looks(check, world) else None for check in checks()}
    with distributed.patience("to compare with the others", world):
        everyone = distributed.gather(own)
        across = ranks.look(subject)
    return {name: merged([each[name] for each in everyone], places) for name in own} | across


def run(check: Check, subject: Subject) -> Finding:
    """A check's finding; what it cannot do is a failure, and the other checks go on."""
    try:
        return check.look(subject)
    except (UserError, RunError, OSError) as error:
        return failure(str(error), "")
    except Exception as error:  # whatever a library raises, the other findings are worth more than its traceback
        said = " ".join(str(error).split())[:300]
        return failure(f"the check itself failed ({type(error).__name__}: {said})", "")


def merged(findings: Sequence[Finding | None], places: Sequence[str]) -> Finding:
    """One finding for those of all ranks, which names the ranks that it is about."""
    found = [(place, finding) for place, finding in zip(places, findings, strict=True) if finding is not None]
    worst = max((finding.level for _, finding in found), key=LEVELS.index)
    concerned = [(place, finding) for place, finding in found if finding.level == worst]
    first = concerned[0][1]
    if worst == "ok":
        return _slowest(found) or first
    if len(concerned) == len(findings):
        return Finding(worst, f"every rank: {first.text}", first.advice)
    told = "; ".join(f"{place}: {finding.text}" for place, finding in concerned[:4])
    more = f"; and {len(concerned) - 4} more ranks" if len(concerned) > 4 else ""
    return Finding(worst, told + more, first.advice)


def as_text(findings: Mapping[str, Finding]) -> str:
    """A line a check, and below it what to do."""
    width = max(map(len, findings))
    lines = []
    for name, finding in findings.items():
        lines.append(f"{finding.level:<8} {name:<{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def as_json(worst: Level, findings: Mapping[str, Finding]) -> str:
    """The same for programs."""
    return json.dumps({"worst": worst, "checks": {name: vars(each) for name, each in findings.items()}}, indent=2)


def _looks(check: Check, world: World) -> bool:
    return {"rank": True, "node": world.local_rank == 0, "main": world.is_main}[check.who]


def _slowest(found: Sequence[tuple[str, Finding]]) -> Finding | None:
    """A warning about the rank that is much slower than the others, if one is."""
    rates = [finding.rate for _, finding in found if finding.rate is not None]
    if not rates:
        return None
    place, slowest = min(found, key=lambda each: each[1].rate)
    if slowest.rate >= SLOW_SHARE * median(rates):
        return None
    return warning(
        f"{place} is slow, and all others wait for it: {slowest.text}; half of the ranks reach "
        f"{median(rates) / slowest.rate:.2f} times that",
        "leave its node out (slurm.options --exclude)",
    )


def _leave(world: World) -> None:
    """Together: a launcher whose first rank has left with a code other than 0 kills the others."""
    from lamda import distributed

    if world.size > 1:
        distributed.barrier()
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
