"""A process that asks for /health and does nothing else, so that no other client's work is in its figures.

`python -m tests.serve.health PORT` asks ten times a second until its standard input ends, and prints as JSON how often
each status came, the seconds of the slowest answer, and by how many seconds its own pauses were too long at the most:
so late can this process itself have been to see an answer.
"""

from __future__ import annotations

import http.client
import json
import select
import sys
import time
from collections import Counter

PAUSE = 0.1


def ask(port: int) -> str:
    """The status of /health on a connection of its own, or the error's name."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def watch(port: int) -> dict[str, object]:
    """Ask until standard input ends."""
    statuses: Counter[str] = Counter()
    slowest = late = 0.0
    while True:
        begun = time.monotonic()
        if select.select([sys.stdin], [], [], PAUSE)[0]:
            return {"statuses": statuses, "slowest": slowest, "late": late}
        late = max(late, time.monotonic() - begun - PAUSE)
        begun = time.monotonic()
        statuses[ask(port)] += 1
        slowest = max(slowest, time.monotonic() - begun)


if __name__ == "__main__":
    print(json.dumps(watch(int(sys.argv[1]))))
