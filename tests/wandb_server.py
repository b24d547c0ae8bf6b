"""A small W&B server on loopback: what wandb 0.31 asks of the real one, kept for a look.

It stores history by line number, as it is told to, and answers RunResumeStatus from what it stored.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = "somebody"


@dataclass
class StoredRun:
    """A run as the server has it: the lines of each stream, the configuration, how it ended."""

    name: str
    project: str = ""
    config: str = "{}"
    summary: str = "{}"
    streams: dict[str, list[str]] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def history(self) -> list[dict[str, Any]]:
        """Every row, in the order of the lines."""
        return [json.loads(line) for line in self.streams.get("wandb-history.jsonl", [])]

    @property
    def steps(self) -> list[int]:
        """The steps of the rows, in the order of the lines."""
        return [row["_step"] for row in self.history]

    def write(self, name: str, *, offset: int, lines: list[str]) -> None:
        """Lines of a stream from line `offset` on; what stood there is replaced."""
        if name == "wandb-summary.json":
            self.summary = lines[-1]
            return
        stored = self.streams.setdefault(name, [])
        if offset > len(stored):
            raise ValueError(f"{name} has {len(stored)} lines, and a client wrote from line {offset}")
        stored[offset : offset + len(lines)] = lines

    def status(self) -> dict[str, Any]:
        """What RunResumeStatus tells of it."""
        history, events, output = (
            self.streams.get(name, []) for name in ("wandb-history.jsonl", "wandb-events.jsonl", "output.log")
        )
        return {
            "id": self.name,
            "name": self.name,
            "displayName": self.name,
            "summaryMetrics": self.summary,
            "historyLineCount": len(history),
            "eventsLineCount": len(events),
            "logLineCount": len(output),
            "historyTail": json.dumps(history[-1:]),
            "eventsTail": json.dumps(events[-1:]),
            "config": self.config,
            "tags": [],
            "notes": "",
            "wandbConfig": '{"t": 1}',
        }


class WandbServer:
    """Runs (by id), alerts, workspaces, and every request but its Authorization header. Use it as a context.

    `fail()` answers 503, `down()` refuses connections, `up()` ends both. refused: requests answered 503.
    stop: whether clients hear that somebody pressed "Stop run".
    """

    def __init__(self) -> None:
        self.runs: dict[str, StoredRun] = {}
        self.alerts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.received: list[bytes] = []
        self.refused = 0
        self.stop = False
        self._is_failing = False
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self._address = ("127.0.0.1", 0)

    def __enter__(self) -> WandbServer:
        self.up()
        return self

    def __exit__(self, *error: object) -> None:
        self.down()

    @property
    def url(self) -> str:
        """What WANDB_BASE_URL must be."""
        return "http://{}:{}".format(*self._address)

    def up(self) -> None:
        """Answer, at the same port as before."""
        self._is_failing = False
        if self._server is None:
            self._server = ThreadingHTTPServer(self._address, type("Handler", (_Handler,), {"owner": self}))
            self._address = self._server.server_address
            threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def fail(self) -> None:
        """Answer 503 to everything."""
        self._is_failing = True

    def rows(self, run_id: str | None) -> int:
        """How many rows of a run are here."""
        return len(self.runs[run_id].history) if run_id in self.runs else 0

    def answer(self, path: str, headers: bytes, body: bytes) -> Any:
        """The answer to a request; None for a server that fails."""
        with self._lock:
            self.received.append(path.encode() + b"\n" + headers + body)
            if self._is_failing:
                self.refused += 1
                return None
            if path == "/graphql":
                asked = json.loads(body)
                name = asked.get("operationName") or re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])[1]
                answer = getattr(self, f"_{name}", None)
                found = answer and {"data": answer(asked.get("variables", {}))}
                return found or {"errors": [{"message": "not known here"}]}
            if path.endswith("/file_stream"):
                return self._stream(self.runs[path.split("/")[-2]], json.loads(body))
            return {}

    def _stream(self, run: StoredRun, sent: dict[str, Any]) -> dict[str, Any]:
        for name, lines in sent.get("files", {}).items():
            run.write(name, offset=lines["offset"], lines=lines["content"])
        run.exit_code = sent.get("exitcode", run.exit_code)
        return {"stopped": self.stop}

    # GraphQL, by the names of the operations.

    def _Viewer(self, asked: dict[str, Any]) -> Any:
        return {"viewer": {"id": USER, "entity": USER, "username": USER, "flags": "{}", "teams": {"edges": []}}}

    def _RunResumeStatus(self, asked: dict[str, Any]) -> Any:
        run = self.runs.get(asked["name"])
        entity = {"id": USER, "name": USER}
        return {"model": {"id": "project", "name": asked["project"], "entity": entity, "bucket": run and run.status()}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> Any:
        is_new = asked["name"] not in self.runs
        run = self.runs.setdefault(asked["name"], StoredRun(asked["name"]))
        run.project = asked["project"] or run.project
        run.config = asked["config"] or run.config
        bucket = {
            "id": run.name,
            "name": run.name,
            "displayName": asked["displayName"] or run.name,
            "project": {"name": run.project, "entity": {"name": USER}},
            "historyLineCount": self.rows(run.name),
        }
        return {"upsertBucket": {"inserted": is_new, "bucket": bucket}}

    def _CreateRunFiles(self, asked: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in asked["files"]]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _UpsertView2(self, asked: dict[str, Any]) -> Any:
        self.views.append(asked)
        return {"upsertView": {"view": {"id": "view", "name": asked["name"]}, "inserted": True}}

    def _NotifyScriptableRunAlert(self, asked: dict[str, Any]) -> Any:
        self.alerts.append(asked)
        return {"notifyScriptableRunAlert": {"success": True}}


class _Handler(BaseHTTPRequestHandler):
    """One connection a request, so that a server that is down is down for everybody."""

    owner: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        del self.headers["Authorization"]
        answer = self.owner.answer(self.path, bytes(self.headers), body)
        if answer is None:
            self.send_error(503)
            return
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""
