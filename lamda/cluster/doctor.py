"""`lamda doctor`: check that a run would work here. Under a launcher all ranks check, and differing ranks are named."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import median

from lamda import distributed
from lamda.cluster.checks.finding import EXIT_CODES, LEVELS, Check, Finding, Subject, failure, warning
from lamda.config.errors import RunError, UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import load_config
from lamda.distributed import World, choose_accelerator, read_world

SLOW_FRACTION = 0.8
"""Fraction of the median rate below which a rank slows down all others."""


def parser() -> ConfigParser:
    """The options of `lamda doctor`."""
    parser = ConfigParser("lamda doctor", epilog="exit code: 0 if all is well, 1 with warnings, 2 with failures")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="test instead: all-reduce, a few steps, a killed rank, an exact resume; exit code 1 if one fails",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="ranks of --smoke on this machine; default: all GPUs, or 2 without one"
    )
    return parser


def main(argv: list[str]) -> int:
    """As `lamda doctor --help` says, for the tiny run by default. Raises UserError."""
    options, flags = parser().parse_known_args(argv)
    if not any(flag.partition("=")[0] == "--config" for flag in flags):
        flags = ["--config", "tiny", *flags]
    if options.smoke:
        from lamda.cluster import smoke

        return smoke.main(flags, ranks=options.ranks, as_json=options.json)
    if options.ranks is not None:
        raise UserError(f"--ranks {options.ranks}: is only for --smoke; a launcher starts the ranks of the checks")
    config, world = load_config(flags), read_world()
    choose_accelerator()
    import torch

    device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    subject = Subject(config, world, device)
    findings = check_one_rank(subject) if world.world_size == 1 else check_all_ranks(subject)
    worst = max((finding.level for finding in findings.values()), key=LEVELS.index)
    if world.is_main_process:
        content = {"worst": worst, "checks": {name: vars(each) for name, each in findings.items()}}
        print(json.dumps(content, indent=2) if options.json else as_text(findings), flush=True)
    _exit_together(world)
    return EXIT_CODES[worst]


def checks() -> list[Check]:
    """The checks of a single rank, in the order of the report."""
    from lamda.cluster.checks import environment, hardware, software

    return [*software.CHECKS, *hardware.CHECKS, *environment.CHECKS]


def check_one_rank(subject: Subject) -> dict[str, Finding]:
    """The findings of one process."""
    return {check.name: run_check(check, subject) for check in checks()}


def check_all_ranks(subject: Subject) -> dict[str, Finding]:
    """The merged findings of all ranks, on every rank."""
    from lamda.cluster.checks import ranks

    world = subject.world
    distributed.start(world, threads=1)
    places = distributed.gather(f"rank {world.rank} (host {socket.gethostname()})")
    runs_here = {"rank": True, "node": world.local_rank == 0, "main": world.is_main_process}
    local = {check.name: run_check(check, subject) if runs_here[check.runs_on] else None for check in checks()}
    with distributed.exit_after("to compare with the others", world):
        everyone = distributed.gather(local)
        across = ranks.check(subject)
    return {name: merged([each[name] for each in everyone], places) for name in local} | across


def run_check(check: Check, subject: Subject) -> Finding:
    """Run a check; an exception becomes a failure, so that the other checks still run."""
    try:
        return check.find(subject)
    except (UserError, RunError, OSError) as error:
        return failure(str(error), "")
    except Exception as error:  # of any library; the other findings are still useful
        reason = " ".join(str(error).split())[:300]
        return failure(f"the check itself failed ({type(error).__name__}: {reason})", "")


def merged(findings: Sequence[Finding | None], places: Sequence[str]) -> Finding:
    """One finding for all ranks, which names the ranks concerned."""
    found = [(place, finding) for place, finding in zip(places, findings, strict=True) if finding is not None]
    worst = max((finding.level for _, finding in found), key=LEVELS.index)
    concerned = [(place, finding) for place, finding in found if finding.level == worst]
    first = concerned[0][1]
    if worst == "ok":
        return _slowest(found) or first
    if len(concerned) == len(findings):
        return Finding(worst, f"every rank: {first.text}", first.advice)
    message = "; ".join(f"{place}: {finding.text}" for place, finding in concerned[:4])
    more = f"; and {len(concerned) - 4} more ranks" if len(concerned) > 4 else ""
    return Finding(worst, message + more, first.advice)


def as_text(findings: Mapping[str, Finding]) -> str:
    """One line per check, with advice below it."""
    width = max(map(len, findings))
    lines = []
    for name, finding in findings.items():
        lines.append(f"{finding.level:<8} {name:<{width}}  {finding.text}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    return "\n".join(lines)


def _slowest(found: Sequence[tuple[str, Finding]]) -> Finding | None:
    """A warning about a rank that is much slower than the others, if there is one."""
    rated = [(finding.rate, place, finding.text) for place, finding in found if finding.rate is not None]
    if not rated:
        return None
    middle = median(rate for rate, _, _ in rated)
    slowest, place, text = min(rated, key=itemgetter(0))
    if slowest >= SLOW_FRACTION * middle:
        return None
    return warning(
        f"{place} is slow, and all others wait for it: {text}; the median rank is {middle / slowest:.2f} times as fast",
        "exclude its node (slurm.options --exclude)",
    )


def _exit_together(world: World) -> None:
    """Exit together: a launcher kills the other ranks when the first one exits with a code other than 0."""
    if world.world_size > 1:
        distributed.barrier()
        distributed.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
