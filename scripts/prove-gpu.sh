#!/bin/sh
# `lamda prove-gpu` on a machine that has Python 3.12, torch, triton and numpy, and no network: see docs/performance.md.
set -eu
kit=$(cd "$(dirname "$0")" && pwd)
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$kit/site" "$kit"/wheels/*.whl
PYTHONPATH="$kit/site" exec python3 "$kit/site/bin/lamda" prove-gpu --text "$kit/text" "$@"
