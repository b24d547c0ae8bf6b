"""Measure: `python scripts/benchmark.py NAME [...]`; `--help` after the name tells its options."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is no part of the package

from benchmarks import main

if __name__ == "__main__":
    sys.exit(main())
