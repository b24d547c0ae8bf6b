"""Python and packages, compared with the tested versions."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from lamda.cluster.checks.finding import Check, Finding, Subject, failure, ok, warning
from lamda.config.errors import UserError
from lamda.config.resources import find

INSTALL = "pip install -c constraints.txt -e ."
OPTIONAL = {"wandb"}
"""Packages that a run does not need; other checks report them."""


def python(subject: Subject) -> Finding:
    """The interpreter's version."""
    here, tested = f"{sys.version_info.major}.{sys.version_info.minor}", tested_python()
    if here != tested:
        return warning(f"{here}; tested with {tested}", f"make an environment with Python {tested}")
    return ok(f"{'.'.join(map(str, sys.version_info[:3]))}, as tested")


def packages(subject: Subject) -> Finding:
    """Required packages: installed, in allowed versions, and preferably in the tested versions."""
    tested, wrong, other = tested_packages(), [], []
    needed = requirements()
    for requirement in needed:
        here = installed(requirement.name)
        if here is None and requirement.name in OPTIONAL:
            continue
        if here is None or not requirement.specifier.contains(here, prereleases=True):
            wrong.append(f"{requirement} is needed, {f'{here} is installed' if here else 'it is not installed'}")
        elif here.partition("+")[0] != tested.get(requirement.name.lower(), here):
            other.append(f"{requirement.name} {here} (tested with {tested[requirement.name.lower()]})")
    if wrong:
        return failure("; ".join(wrong), INSTALL)
    if other:
        return warning("; ".join(other), f"{INSTALL} installs the tested versions")
    return ok(f"all {len(needed)} as tested: torch {installed('torch')}, deepspeed {installed('deepspeed')}")


def tested_python() -> str:
    """The Python version that constraints.txt names in its first line."""
    found = re.search(r"Python (\d+\.\d+)", _constraints())
    if found is None:
        raise UserError("constraints.txt: its first line does not name a Python version")
    return found[1]


def tested_packages() -> dict[str, str]:
    """Versions by package name in lower case."""
    lines = (line.partition("==") for line in _constraints().splitlines() if "==" in line)
    return {name.strip().lower(): version.strip() for name, _, version in lines}


def requirements() -> list[Requirement]:
    """The requirements of lamda-pytorch without extras. Raises UserError if it is not installed."""
    try:
        found = map(Requirement, requires("lamda-pytorch") or ())
    except PackageNotFoundError as error:
        raise UserError(f"lamda-pytorch is not installed for {sys.executable}; {INSTALL}") from error
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    """A package's version, None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _constraints() -> str:
    return find("constraints.txt").read_text("utf-8")


CHECKS = (Check("python", "rank", python), Check("packages", "rank", packages))
