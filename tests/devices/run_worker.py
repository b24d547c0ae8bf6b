"""`scripts/pretrain_flax.py` for several lists of arguments in one process, one after the other: JAX loads slowly.

`run_worker.py '[["--config", ...], ...]'` prints the exit codes as JSON, last.
"""

from __future__ import annotations

import json
import sys

from lamda.launch.pretrain_flax import main

if __name__ == "__main__":
    codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
    print(json.dumps(codes))
