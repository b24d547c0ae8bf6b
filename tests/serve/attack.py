"""`make serve-attack`: a server of its own on this machine's loopback, hostile clients, and honest ones to be served.

It fails where an honest client gets a 5xx, /health takes more than a second, or the server's memory afterwards is more
than 10% above what it was.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.conftest import make_text, train_tokenizer
from tests.random_run import write_run

KEY = "a-key-of-the-attack"
HONEST = 4
WARM_SECONDS = 180.0
"""Until memory no longer rises: a first run had 293 MB after a minute, 339 after four and 348 after eleven."""
QUIET_SECONDS = 15.0
SERVE = "import sys; from lamda.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"


class Server:
    """`lamda serve` with its defaults, on random weights that judge their candidates."""

    def __init__(self, folder: Path) -> None:
        train_tokenizer([make_text(seed, 200) for seed in range(20)], folder / "tokenizer.model", vocab_size=400)
        run = write_run(folder / "random", folder / "tokenizer.model")
        for config in run.rglob("config.yaml"):
            config.write_text(config.read_text("utf-8").replace("packing: documents", "packing: whole"), "utf-8")
        (folder / "key").write_text(KEY, "utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        command = [sys.executable, "-c", SERVE, str(run), "--port", str(self.port), "--key-file", str(folder / "key")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, "--threshold", "1"], stdout=log, stderr=subprocess.STDOUT)
        while not self.answers():
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start:\n{self.log.read_text('utf-8', 'replace')}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether /health does."""
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            return False

    def request(self, method: str, path: str, body: object = None, *, seconds: float = 180) -> tuple[int, bytes]:
        """Status and content of an answer, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def megabytes(self) -> float:
        """Resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024

    def stop(self) -> float:
        """Seconds that it took to end."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        return time.monotonic() - begun


class Honest:
    """Clients that do nothing wrong, and one that asks for /health all the time, in a process of its own.

    Attributes:
        statuses: of the answers to them; a connection that failed has its error's name.
        slowest: seconds that /health took at the most.
        late: seconds by which the process that asks for it was itself delayed at the most.
    """

    def __init__(self, server: Server) -> None:
        self.statuses: Counter[str] = Counter()
        self.slowest = self.late = 0.0
        self._server, self._stop = server, threading.Event()
        command = [sys.executable, "-m", "tests.serve.health", str(server.port)]
        self._health = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(HONEST)]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """After their last answers."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        found = json.loads(self._health.communicate(timeout=60)[0])
        self.slowest, self.late = found["slowest"], found["late"]
        self.statuses.update({f"health {status}": count for status, count in found["statuses"].items()})

    def _ask(self, number: int) -> None:
        seed = 0
        while not self._stop.wait(0.3):
            seed += 1
            asked = {"model": "random", "max_tokens": 24, "seed": seed, "stream": number == 2}
            if number % 2:
                said = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "that is it"}]
                work = partial(self._post, "/v1/chat/completions", {**asked, "messages": said, "candidates": 4})
                self._count("chat", work)
            else:
                self._count("text", partial(self._post, "/v1/completions", {**asked, "prompt": "the of and", "n": 2}))

    def _post(self, path: str, asked: object) -> tuple[int, bytes]:
        status, content = self._server.request("POST", path, asked)
        if status == 200 and b'{"error":' in content:
            return 599, content  # a stream that broke off
        return status, content

    def _count(self, kind: str, ask: Callable[[], tuple[int, bytes]]) -> None:
        try:
            status = str(ask()[0])
        except (OSError, http.client.HTTPException) as error:
            status = type(error).__name__
        self.statuses[f"{kind} {status}"] += 1


def main(argv: list[str]) -> int:
    """Attack, report, and 0 where the server held."""
    parser = argparse.ArgumentParser(prog="attack")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=1000)
    options = parser.parse_args(argv)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(4 * options.clients + 500, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            return _report(server, options.seconds, options.clients)
        finally:
            server.process.kill()
            server.process.wait()


def _report(server: Server, seconds: float, clients: int) -> int:
    warm = Honest(server)
    _hostile(server, clients, WARM_SECONDS)  # threads, allocators' arenas and buffers are there from here on
    warm.end()
    time.sleep(QUIET_SECONDS)
    before = server.megabytes()
    honest = Honest(server)
    tried = _hostile(server, clients, seconds)
    honest.end()
    time.sleep(QUIET_SECONDS)
    after = server.megabytes()
    figures = server.request("GET", "/metrics")[1].decode()
    log = server.log.read_text("utf-8", "replace")
    took = server.stop()
    print(json.dumps({"tried": tried, "honest": honest.statuses}, indent=1))
    print(
        "\n".join(
            line
            for line in figures.splitlines()
            if line.startswith("lamda_") and "bucket" not in line and "created" not in line
        )
    )
    print(f"log: {len(log.splitlines())} lines, {log.count('Traceback')} tracebacks; ended in {took:.1f} s")
    print(log[-3000:])
    print(f"health {honest.slowest:.2f} s at worst (the process that asks was itself up to {honest.late:.2f} s late)")
    print(f"memory {before:.0f} MB before, {after:.0f} MB after")
    answered = [kind for kind in ("chat 200", "text 200") if honest.statuses[kind]]
    failed = {
        name: count
        for name, count in honest.statuses.items()
        if name.split()[1][:1] not in "24" or name == "health 429"
    }
    problems = [
        *([f"honest clients got {failed}"] if failed else []),
        *(["honest clients got no answer"] if len(answered) < 2 else []),
        *(["/health took more than a second"] if honest.slowest > 1 else []),
        *(["memory has grown by more than 10%"] if after > 1.1 * before else []),
        *(["the log has tracebacks"] if "Traceback" in log else []),
    ]
    print("\n".join(problems) or "the server held")
    return bool(problems)


def _hostile(server: Server, clients: int, seconds: float) -> dict[str, int]:
    """In a process of its own, behind the others on this machine's processors: in truth they have their own."""
    words = [str(server.port), KEY, str(clients), str(seconds)]
    done = subprocess.run(
        ["nice", "-n", "10", sys.executable, "-m", "tests.serve.hostile", *words],
        check=True,
        stdout=subprocess.PIPE,
        timeout=seconds + 120,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
