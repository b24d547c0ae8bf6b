"""`make serve-attack`: a load test. A server of its own on this machine's loopback, honest clients, hostile ones.

It fails where an honest client's reply is refused, lost, incomplete or not what the same request gets alone, where any
answer is a 5xx, where /health takes more than a second, or where the server's memory afterwards is more than 10% above
what it was.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import make_text, train_tokenizer
from tests.random_run import write_run

KEY, HOSTILE_KEY = "a-key-of-the-attack", "another-one"
KINDS = ("text", "chat", "text stream", "chat stream")
TURNS = 12
"""More than the row of the model holds."""

WARM_SECONDS = 180.0
"""Until memory no longer rises: a first run had 293 MB after a minute, 339 after four and 348 after eleven."""
QUIET_SECONDS = 15.0
SERVE = "import sys; from lamda.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"


class Server:
    """`lamda serve` with a key for each kind of client, on random weights that judge their candidates."""

    def __init__(self, folder: Path) -> None:
        train_tokenizer([make_text(seed, 200) for seed in range(20)], folder / "tokenizer.model", vocab_size=400)
        run = write_run(folder / "random", folder / "tokenizer.model")
        for config in run.rglob("config.yaml"):
            config.write_text(config.read_text("utf-8").replace("packing: documents", "packing: whole"), "utf-8")
        (folder / "honest").write_text(KEY, "utf-8")
        (folder / "hostile").write_text(HOSTILE_KEY, "utf-8")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.log = folder / "log"
        command = [sys.executable, "-c", SERVE, str(run), "--port", str(self.port), "--threshold", "1"]
        command += [word for name in ("honest", "hostile") for word in ("--key-file", str(folder / name))]
        command += ["--key-requests", "32", "--key-tokens", "131072"]  # no key can keep the other out
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
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

    Half of them complete texts, half of them hold conversations that outgrow the model's row, with and without streams.

    Attributes:
        found: how often a reply was right, by kind, and whatever else came instead.
        slowest: seconds that /health took at the most.
        late: seconds by which the process that asks for it was itself delayed at the most.
    """

    def __init__(self, server: Server, expected: dict[str, list[str]]) -> None:
        """expected: the replies to each kind of client, in order."""
        self.found: Counter[str] = Counter()
        self.slowest = self.late = 0.0
        self._server, self._expected, self._stop = server, expected, threading.Event()
        self._threads: list[threading.Thread] = []
        command = [sys.executable, "-m", "tests.serve.health", str(server.port)]
        self._health = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def begin(self, count: int) -> Honest:
        """So many clients."""
        self._threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()
        return self

    def end(self) -> None:
        """After their last replies."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        found = json.loads(self._health.communicate(timeout=60)[0])
        self.slowest, self.late = found["slowest"], found["late"]
        self.found.update({f"health {status}": count for status, count in found["statuses"].items()})

    def _ask_on(self, number: int) -> None:
        kind = KINDS[number % len(KINDS)]
        while not self._stop.is_set():
            said: list[dict[str, str]] = []
            for turn, expected in enumerate(self._expected[kind]):
                if self._stop.wait(0.3):
                    return
                reply = ask(self._server, kind, turn, said)
                outcome = "right" if reply == expected else "other" if isinstance(reply, str) else repr(reply)
                self.found[f"{kind} {outcome}"] += 1
                said.append({"role": "assistant", "content": expected})


def ask(server: Server, kind: str, turn: int, said: list[dict[str, str]]) -> str | tuple[str, str]:
    """The text of the reply, or what came instead. A chat's turn is added to `said`, which its reply follows."""
    asked = {"model": "random", "max_tokens": 24, "seed": turn, "stream": kind.endswith("stream")}
    if kind.startswith("chat"):
        said.append({"role": "user", "content": f"that is it {turn}"})
        body = {**asked, "messages": [{"role": "system", "content": "be kind"}, *said], "candidates": 4}
        path = "/v1/chat/completions"
    else:
        path, body = "/v1/completions", {**asked, "prompt": f"the of and {turn}"}
    try:
        status, content = server.request("POST", path, body)
    except (OSError, http.client.HTTPException) as error:
        return "failed", type(error).__name__
    if status != 200:
        return "status", str(status)
    return _streamed(content.decode()) if asked["stream"] else _text(json.loads(content)["choices"])


def _text(choices: list[dict[str, Any]]) -> str:
    return "".join(choice.get("message", choice).get("content", choice.get("text")) for choice in choices)


def _streamed(content: str) -> str | tuple[str, str]:
    lines = [line.removeprefix("data: ") for line in content.splitlines() if line]
    if lines[-1:] != ["[DONE]"]:
        return "failed", lines[-1][:100] if lines else "empty stream"
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    if choices[-1]["finish_reason"] is None:
        return "failed", "no reason"
    return "".join(choice.get("delta", choice).get("content") or choice.get("text") or "" for choice in choices)


def alone(server: Server) -> dict[str, list[str]]:
    """The replies to each kind of client while there is no other."""
    expected: dict[str, list[str]] = {}
    for kind in KINDS:
        said: list[dict[str, str]] = []
        expected[kind] = []
        for turn in range(TURNS):
            reply = ask(server, kind, turn, said)
            if not isinstance(reply, str):
                raise SystemExit(f"without any other client, {kind} got {reply}")
            expected[kind].append(reply)
            said.append({"role": "assistant", "content": reply})
    return expected


def main(argv: list[str]) -> int:
    """Attack, report, and 0 where the server held."""
    parser = argparse.ArgumentParser(prog="attack")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--warm", type=float, default=WARM_SECONDS, help="seconds before memory is first measured")
    parser.add_argument("--clients", type=int, default=30, help="a third of them hostile, unless --hostile says more")
    parser.add_argument("--hostile", type=int)
    options = parser.parse_args(argv)
    hostile = options.clients // 3 if options.hostile is None else options.hostile
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4 * hostile + 500, hard)), hard))
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        try:
            return _report(server, options.seconds, options.warm, options.clients - options.clients // 3, hostile)
        finally:
            server.process.kill()
            server.process.wait()


def _report(server: Server, seconds: float, warm_seconds: float, honest_clients: int, hostile: int) -> int:
    expected = alone(server)
    warm = Honest(server, expected).begin(honest_clients)
    _hostile(server, hostile, warm_seconds)  # threads, allocators' arenas, caches and buffers are there from here on
    warm.end()
    time.sleep(QUIET_SECONDS)
    before = server.megabytes()
    honest = Honest(server, expected).begin(honest_clients)
    tried = _hostile(server, hostile, seconds)
    honest.end()
    time.sleep(QUIET_SECONDS)
    after = server.megabytes()
    figures = server.request("GET", "/metrics")[1].decode()
    log = server.log.read_text("utf-8", "replace")
    took = server.stop()
    print(json.dumps({"tried": tried, "honest": honest.found}, indent=1))
    print("\n".join(line for line in figures.splitlines() if re.match(r"lamda_(?!.*(bucket|created))", line)))
    print(f"log: {len(log.splitlines())} lines, {log.count('Traceback')} tracebacks; ended in {took:.1f} s")
    print(log[-3000:])
    print(f"health {honest.slowest:.2f} s at worst (the process that asks was itself up to {honest.late:.2f} s late)")
    print(f"memory {before:.0f} MB before, {after:.0f} MB after")
    right = {kind: honest.found[f"{kind} right"] for kind in KINDS}
    lost = {name: count for name, count in honest.found.items() if name.split()[-1] not in ("right", "other", "200")}
    other = sum(honest.found[f"{kind} other"] for kind in KINDS)
    failed = re.findall(r'lamda_requests_total{key="\w*",status="(5\d\d)"} (\S+)', figures)
    problems = [
        *([f"honest clients got {lost}"] if lost else []),
        *([] if all(right.values()) else [f"there are clients that got no reply: {right}"]),
        # Products of other sizes round differently, so once in a long while another token is drawn.
        *([f"{other} replies were not those of a client alone"] if other > sum(right.values()) / 1000 else []),
        *([f"answers were {failed}"] if failed else []),
        *(["/health took more than a second"] if honest.slowest > 1 + honest.late else []),
        *(["memory has grown by more than 10%"] if after > 1.1 * before else []),
        *(["the log has tracebacks"] if "Traceback" in log else []),
    ]
    print("\n".join(problems) or "the server held")
    return bool(problems)


def _hostile(server: Server, clients: int, seconds: float) -> dict[str, int]:
    """In a process of its own, behind the others on this machine's processors: in truth they have their own."""
    words = [str(server.port), HOSTILE_KEY, str(clients), str(seconds)]
    done = subprocess.run(
        ["nice", "-n", "10", sys.executable, "-m", "tests.serve.hostile", *words],
        check=True,
        stdout=subprocess.PIPE,
        timeout=seconds + 120,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
