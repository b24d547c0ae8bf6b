"""A server on a port of its own, with a model of random weights."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from lamda.dialog.server.app import App
from lamda.dialog.server.connections import Server
from lamda.dialog.server.guard import LOOPBACK
from lamda.dialog.server.limits import Limits
from lamda.dialog.server.service import Service
from lamda.dialog.speaker import ReplyOptions
from lamda.inference import generation
from lamda.inference.loading import LoadedModel, load_run
from lamda.inference.sampling import Sampling
from tests.random_run import write_run

KEY = "a key of the tests"


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "random", tokenizer_path)


@pytest.fixture(scope="session")
def loaded(run: Path) -> LoadedModel:
    return load_run(run)


def make_service(loaded: LoadedModel, **limits: float) -> Service:
    return Service(
        loaded.model,
        loaded.tokenizer,
        name="random",
        sequence_length=256,
        is_tuned=True,
        options=ReplyOptions(candidates=4, threshold=1.0, sampling=Sampling(max_new_tokens=12)),
        limits=Limits(**{"tokens": 600, "bytes": 50_000, "requests": 40, "seconds": 60.0, **limits}),
    )


@contextmanager
def serving(
    service: Service,
    *,
    key: str | None = KEY,
    keys: Mapping[str, str] | None = None,
    grace: float = 0.0,
    **options: bool,
) -> Iterator[str]:
    """Its address."""
    if keys is None:
        keys = {} if key is None else {"tests": key}
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(App(service, hosts=LOOPBACK, keys=keys, **options), grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def service(loaded: LoadedModel) -> Service:
    return make_service(loaded)


@pytest.fixture(scope="session")
def address(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture
def collector_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[generation.Rows]:
    """The keys and values that are alive."""
    found: weakref.WeakSet[generation.Rows] = weakref.WeakSet()
    begin = generation.Rows.__init__

    def watched(rows: generation.Rows, *arguments: object, **options: object) -> None:
        begin(rows, *arguments, **options)
        found.add(rows)

    monkeypatch.setattr(generation.Rows, "__init__", watched)
    return found
