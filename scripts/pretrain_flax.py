"""Pre-train with JAX: `python scripts/pretrain_flax.py --config FILE [--multihost] [--section.key VALUE ...]`."""

import sys

from lamda.launch.pretrain_flax import main

if __name__ == "__main__":
    sys.exit(main())
