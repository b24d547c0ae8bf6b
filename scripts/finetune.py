"""Fine-tune a LaMDA on dialogues: `deepspeed scripts/finetune.py --config FILE [--section.key VALUE ...]`."""

import importlib.util
import sys
from pathlib import Path

found = importlib.util.find_spec("lamda")
if found is None or found.origin is None or "An open LaMDA" not in Path(found.origin).read_text("utf-8"):
    sys.exit(
        f"`import lamda` finds {found.origin if found else 'nothing'}, not this project (another package of that "
        "name is on the index): run `pip uninstall lamda`, then `pip install -e .` here"
    )

from lamda.launch.finetune import main  # noqa: E402 - only once it is known to be ours

if __name__ == "__main__":
    sys.exit(main())
