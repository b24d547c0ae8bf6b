"""Which of the user's environment variables the ranks get, and which of them nobody else may read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

PASSED_ON = ("NCCL_*", "GLOO_*", "HF_*", "WANDB_*", "OMP_*", "TORCH_*", "PYTHONPATH", "*_proxy", "*_PROXY")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL")


def passed_on(environment: Mapping[str, str], more: Iterable[str] = ()) -> dict[str, str]:
    """The variables whose names match PASSED_ON or one of the patterns `more`, by name."""
    patterns = (*PASSED_ON, *more)
    return {
        name: value
        for name, value in sorted(environment.items())
        if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def is_secret(name: str, value: str) -> bool:
    """Whether a variable must not stand in a file or on a command line: by its name, or an address with a password."""
    return any(word in name.upper() for word in _SECRET) or re.search("://[^/]*@", value) is not None
