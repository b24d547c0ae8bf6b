"""Run a benchmark: `python scripts/benchmark.py NAME [...]`; options: `--help` after the name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is not part of the package

from benchmarks import main

if __name__ == "__main__":
    sys.exit(main())
