"""Measure: `python scripts/benchmark.py NAME [...]`; `--help` after the name tells its options."""

import sys

from lamda.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
