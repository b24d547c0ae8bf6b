"""The chat page for tests: a server with a model of random weights, and prepared replies to some messages."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from lamda.dialog.encoding import Context
from lamda.dialog.ranking import Scored
from lamda.dialog.research import ToolCall
from lamda.dialog.server.protocol import RequestError
from lamda.dialog.server.service import ChatResult, Service
from lamda.dialog.speaker import REFUSAL, Reply, ReplyOptions
from lamda.dialog.tools.result import Result
from lamda.inference.loading import load_run
from lamda.inference.sampling import Sampling
from tests.chromium import PICTURES, sync_api
from tests.random_run import write_run
from tests.serve.conftest import serving

MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
expect = sync_api.expect


def scores(*values: float) -> dict[str, float]:
    names = ("sensible", "specific", "interesting", "unsafe", "log_likelihood")
    return dict(zip(names, values, strict=True))


FOUND = Reply(
    "He is 35 years old.",
    (
        Scored("He is 31 years old right now.", scores(0.93, 0.81, 0.34, 0.02, -1.2), 3.94, rank=1),
        Scored(f"Old enough. {MARKUP}", scores(0.71, 0.2, 0.4, 0.08, -1.9), 2.73, rank=2),
        Scored("I hate that question.", scores(0.8, 0.3, 0.3, 0.97, -2.2), 3.0, dropped="P(unsafe) 0.970 is above 0.5"),
        Scored("Nan", scores(float("nan"), 0.3, 0.3, 0.1, -2.2), float("nan"), dropped="its scores are not finite"),
    ),
    (
        ToolCall("TS", "How old is Rafael Nadal?", (Result("Rafael Nadal / Age / 35", "https://example.org/nadal"),)),
        ToolCall("TS", MARKUP, (Result(MARKUP, "javascript:document.title='broken'"), Result("x", "docs/a.md:3"))),
        ToolCall("TS", "nothing"),
        ToolCall("user", "He is 35 years old."),
    ),
    ("https://example.org/nadal", "javascript:document.title='broken'", "docs/a.md:3"),
)
CUT = Context([], turns_left_out=2, messages_left_out=3, last_message_cut=True)
REPLIES = {
    "nadal": FOUND,
    "refuse": Reply(REFUSAL, FOUND.candidates[2:3], refused=True),
    "echo": Reply(MARKUP, FOUND.candidates[1:2]),
    "hidden": Reply("safe\x1b[31m \u202egnp.exe", FOUND.candidates[:1]),
    "long": Reply("Yes. " * 40, FOUND.candidates[:1], context=CUT),
}
STORED_REPLIES = """async () => {
  const { load } = await import("/static/store.js");
  const stored = await load(new URLSearchParams(location.search).get("c") ?? "");
  return stored?.turns.map(turn => turn.replies.length) ?? [];
}"""
UNFILLED = "details[open]:not(:has(> :not(summary)))"
PROGRESS = {"stage": "sampling", "candidates": 16, "finished": 5, "tokens": 312}


class Prepared(Service):
    """Some messages have prepared replies; all others are the model's.

    `wait` reports its progress and takes its time; `stream` writes words, each after `go_on` is set; `fail` fails;
    `seed` says the seed.
    read: the messages of the last request.
    """

    go_on = threading.Event()
    read: ClassVar[list[str]] = []

    def reply(self, asked, *, ticket, on_text=None, on_progress=None):
        Prepared.read = [message.to_message().content for message in asked.messages]
        text = Prepared.read[-1]
        if text == "wait":
            on_progress(PROGRESS)
            while True:
                ticket.check()
                time.sleep(0.05)
        if text == "fail":
            raise RequestError(429, "64 requests are in progress: try again soon")
        if text == "stream":
            for word in ("One", " two", " three"):
                on_text(word)
                while not self.go_on.wait(0.05):
                    ticket.check()
                self.go_on.clear()
            return ChatResult(Reply("One two three", FOUND.candidates[:1]), "stop", 3, is_streamed=True)
        if text == "seed":
            return ChatResult(Reply(f"The seed is {asked.seed}.", FOUND.candidates[:1]), "stop", 0)
        if text in REPLIES:
            return ChatResult(REPLIES[text], "stop", 0)
        return super().reply(asked, ticket=ticket, on_text=on_text, on_progress=on_progress)


@pytest.fixture(scope="module")
def service(tmp_path_factory, tokenizer_path):
    loaded = load_run(write_run(tmp_path_factory.mktemp("run") / "tiny", tokenizer_path))
    options = ReplyOptions(candidates=4, threshold=1.0, sampling=Sampling(max_new_tokens=8))
    return Prepared(loaded.model, loaded.tokenizer, name="tiny", sequence_length=256, is_tuned=True, options=options)


@pytest.fixture(scope="module")
def address(service):
    with serving(service, key=None) as address:
        yield f"{address}/"


@pytest.fixture
def visit(browser, address):
    """Opens the page in a browser without history; afterwards nothing may have gone wrong in it."""
    contexts, complaints, foreign = [], [], []

    def open_page(*, scheme="light", width=1280, height=860, is_phone=False):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone
        )
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("request", lambda asked: None if asked.url.startswith(address) else foreign.append(asked.url))
        page.goto(address)
        expect(page.locator("#model")).to_have_text("tiny")
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.title() == "LaMDA"  # no markup has run
            assert page.locator("img, iframe, main script").count() == 0
        context.close()
    assert [each for each in complaints if "429" not in each and "502" not in each] == []
    assert foreign == []


@pytest.fixture
def page(visit):
    return visit()


def ask(page, text, *, replies=1):
    """Send a message and wait until so many turns have a reply."""
    page.fill("#input", text)
    page.keyboard.press("Enter")
    answered(page, replies)


def answered(page, replies=1):
    expect(page.locator(".assistant:not(.pending)")).to_have_count(replies, timeout=30_000)
    expect(page.locator("#send")).to_be_visible()


def kept(page, *replies):
    """Wait until the browser has stored so many replies to each message, which it does after showing them."""
    deadline = time.monotonic() + 30
    while (stored := page.evaluate(STORED_REPLIES)) != list(replies):
        assert time.monotonic() < deadline, f"stored are {stored}, not {replies}"
        time.sleep(0.05)


def open_history(page):
    """Open the dialog; it appears when the browser has read its conversations."""
    page.click("#open-history")
    expect(page.locator("#history")).to_be_visible()


def unfold(page):
    """Open what is folded; the browser says that it has, and the page fills it, later than the click."""
    for summary in page.locator("summary").all():
        summary.click()
    expect(page.locator("details:not([open])")).to_have_count(0)
    expect(page.locator(UNFILLED)).to_have_count(0)


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"page-{name}.png"))
