"""The thread that does all work on the model: each request's end is its own, and leaves nothing and nobody behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from threading import Thread

import pytest
import torch

from lamda.config.errors import RunError
from lamda.dialog.server.admission import ClientDisconnected, DeadlineExceeded, Ticket
from lamda.dialog.server.scheduler import Scheduler
from lamda.inference import generation
from lamda.inference.generation import prefill, prefill_pieces
from lamda.inference.sampling import Sampling


@pytest.fixture
def scheduler(loaded):
    scheduler = Scheduler(loaded.model)
    yield scheduler
    scheduler.close()


def test_who_comes_after_the_end_is_sent_away_and_does_not_wait(scheduler, loaded):
    prefix = prefill(loaded.model, [0, 70])
    scheduler.close()
    message = []

    def come_late():
        try:
            scheduler.sample(prefix, count=1, sampling=Sampling(max_new_tokens=1), ticket=Ticket(seconds=60))
        except ClientDisconnected as abandoned:
            message.append(abandoned)

    thread = Thread(target=come_late, daemon=True)
    thread.start()
    thread.join(10)
    assert message


@pytest.mark.parametrize("end", ["finished", "abandoned", "failed"])
def test_keys_and_values_are_free_without_a_garbage_collection(scheduler, loaded, alive, collector_off, end):
    def one(seed):
        ticket = Ticket(seconds=60)

        def on_token(number, id):
            if end == "abandoned":
                ticket.abandon()
            if end == "failed":
                raise KeyError(id)

        prefix = scheduler.run(prefill_pieces(loaded.model, [0, 70, seed]), ticket=ticket)
        sampling = Sampling(max_new_tokens=5, seed=seed)
        try:
            scheduler.sample(prefix, count=2, sampling=sampling, ticket=ticket, on_token=on_token)
        except (ClientDisconnected, RunError):
            assert end != "finished"

    for seed in range(3):
        one(seed)
    deadline = time.monotonic() + 10
    while len(alive) and time.monotonic() < deadline:  # the thread may be at its last line
        time.sleep(0.01)
    assert len(alive) == 0


def test_what_one_request_fails_with_is_not_the_others(scheduler, loaded):
    model, good = loaded.model, prefill(loaded.model, [0, 70])
    sampling = Sampling(max_new_tokens=40, seed=2)
    alone = generation.sample(model, good, count=2, sampling=sampling).ids

    def fails(number, id):
        raise ZeroDivisionError

    broken = prefill(model, [0, 71])
    broken.key_values_SNHPK.fill_(torch.nan)
    with ThreadPoolExecutor() as pool:
        asks = [(good, None), (broken, None), (good, fails), (good, None)]
        works = [
            pool.submit(
                scheduler.sample, prefix, count=2, sampling=sampling, ticket=Ticket(seconds=60), on_token=on_token
            )
            for prefix, on_token in asks
        ]
        found = [type(work.exception()) if work.exception() else work.result().ids for work in works]
    assert found == [alone, RunError, RunError, alone]


def test_a_step_that_fails_for_one_request_is_taken_by_the_others(scheduler, loaded, monkeypatch):
    model, prefix = loaded.model, prefill(loaded.model, [0, 70])
    alone = generation.sample(model, prefix, count=3, sampling=Sampling(max_new_tokens=9)).ids
    whole = generation.forward

    def forward(model, groups):
        if any(len(group.rows) == 2 for group in groups):
            raise torch.OutOfMemoryError("none left")
        return whole(model, groups)

    monkeypatch.setattr("lamda.dialog.server.scheduler.forward", forward)
    with ThreadPoolExecutor() as pool:
        works = [
            pool.submit(
                scheduler.sample,
                prefix,
                count=count,
                sampling=Sampling(max_new_tokens=9),
                ticket=Ticket(seconds=60),
            )
            for count in (3, 2, 3)
        ]
        found = [str(work.exception()) if work.exception() else work.result().ids for work in works]
    assert found == [alone, "OutOfMemoryError: none left", alone]


def test_the_time_limit_holds_for_prompts_and_short_ones_do_not_wait_for_long(scheduler):
    order = []

    def pieces(name, count):
        for number in range(count):
            order.append(name)
            time.sleep(0.01)
            if number < count - 1:
                yield
        return name

    with ThreadPoolExecutor() as pool:
        late = [
            pool.submit(scheduler.run, pieces(f"late{n}", 1000), tokens=9000, ticket=Ticket(seconds=0.5))
            for n in range(20)
        ]
        while not order:
            time.sleep(0.001)
        assert scheduler.run(pieces("short", 2), tokens=1, ticket=Ticket(seconds=60)) == "short"
        assert all(isinstance(work.exception(), DeadlineExceeded) for work in late)
    assert len(order) < 20_000
    assert order.index("short") < 1000
    long = [name for name, _ in groupby(name for name in order if name != "short")]
    assert len(long) == len({*long}), "one long prompt after another"


def test_candidates_that_the_client_left_are_not_begun(scheduler, loaded, monkeypatch):
    begun = []
    monkeypatch.setattr("lamda.dialog.server.scheduler.Candidates", lambda *given, **options: begun.append(given))
    ticket = Ticket(seconds=60)
    ticket.abandon()
    with pytest.raises(ClientDisconnected):
        scheduler.sample(prefill(loaded.model, [0]), count=1, sampling=Sampling(), ticket=ticket)
    assert begun == []
