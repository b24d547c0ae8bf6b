"""Calls `pretrain` with each list of arguments in ARGUMENTS.json; writes (code, stdout, stderr) to RESULTS.json."""

import contextlib
import io
import json
import sys
from pathlib import Path

from lamda import distributed
from lamda.launch.pretrain import main

if __name__ == "__main__":
    distributed.stop = lambda: None  # DeepSpeed keeps its groups for the life of a process
    results = {}
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
        results[name] = (code, out.getvalue(), err.getvalue())
    Path(sys.argv[2]).write_text(json.dumps(results))
