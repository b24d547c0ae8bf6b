"""The thread that generates for all ends without leaving anyone waiting."""

from __future__ import annotations

from threading import Thread

from lamda.dialog.server.scheduler import Abandoned, Scheduler, Ticket
from lamda.inference.generation import prefill
from lamda.inference.sampling import Sampling


def test_who_comes_after_the_end_is_sent_away_and_does_not_wait(loaded):
    scheduler, prefix = Scheduler(loaded.model), prefill(loaded.model, [0, 70])
    scheduler.close()
    told = []

    def come_late():
        try:
            scheduler.sample(prefix, count=1, sampling=Sampling(max_new_tokens=1), ticket=Ticket(seconds=60))
        except Abandoned as abandoned:
            told.append(abandoned)

    thread = Thread(target=come_late, daemon=True)
    thread.start()
    thread.join(10)
    assert told
