"""The chat page in Chromium: what it shows, and that nothing typed or generated becomes markup."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamda.dialog.ranking import Scored
from lamda.dialog.research import ToolCall
from lamda.dialog.server.service import ChatResult, Service
from lamda.dialog.speaker import REFUSAL, Reply, ReplyOptions
from lamda.dialog.tools.result import Result
from lamda.inference.loading import load_run
from lamda.inference.sampling import Sampling
from tests.chromium import PICTURES, browser, sync_api  # noqa: F401 - a fixture
from tests.random_run import write_run
from tests.serve.conftest import serving

MARKUP = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


def _scores(*values: float) -> dict[str, float]:
    names = ("sensible", "specific", "interesting", "unsafe", "log_likelihood")
    return dict(zip(names, values, strict=True))


FOUND = Reply(
    "He is 35 years old.",
    (
        Scored("He is 31 years old right now.", _scores(0.93, 0.81, 0.34, 0.02, -1.2), 3.94, rank=1),
        Scored(f"Old enough. {MARKUP}", _scores(0.71, 0.2, 0.4, 0.08, -1.9), 2.73, rank=2),
        Scored(
            "I hate that question.", _scores(0.8, 0.3, 0.3, 0.97, -2.2), 3.0, dropped="P(unsafe) 0.970 is above 0.5"
        ),
    ),
    (
        ToolCall("TS", "How old is Rafael Nadal?", (Result("Rafael Nadal / Age / 35", "https://example.org/nadal"),)),
        ToolCall("TS", MARKUP, (Result(MARKUP, "javascript:document.title='broken'"), Result("x", "docs/a.md:3"))),
        ToolCall("TS", "nothing"),
        ToolCall("user", "He is 35 years old."),
    ),
    ("https://example.org/nadal", "javascript:document.title='broken'", "docs/a.md:3"),
)
REFUSED = Reply(REFUSAL, FOUND.candidates[2:], refused=True)
REPLIES = {"nadal": FOUND, "refuse": REFUSED, "echo": Reply(MARKUP, FOUND.candidates[1:2])}


class Prepared(Service):
    """Some messages have a prepared reply; `wait` takes its time; all others are the model's."""

    def reply(self, asked, *, ticket):
        text = asked.messages[-1].to_message().content
        if text == "wait":
            while True:
                ticket.check()
                time.sleep(0.05)
        return ChatResult(REPLIES[text], "stop", 0) if text in REPLIES else super().reply(asked, ticket=ticket)


@pytest.fixture(scope="module")
def service(tmp_path_factory, tokenizer_path):
    loaded = load_run(write_run(tmp_path_factory.mktemp("run") / "tiny", tokenizer_path))
    options = ReplyOptions(candidates=4, threshold=1.0, sampling=Sampling(max_new_tokens=8))
    return Prepared(loaded.model, loaded.tokenizer, name="tiny", sequence_length=256, is_tuned=True, options=options)


def _serve(service: Service, *, key: str | None) -> Iterator[str]:
    with serving(service, key=key) as address:
        yield f"{address}/"


@pytest.fixture(scope="module")
def address(service):
    yield from _serve(service, key=None)


@pytest.fixture
def page(browser, address):  # noqa: F811
    page = browser.new_page(viewport={"width": 900, "height": 900})
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.goto(address)
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    yield page
    assert complaints == []
    assert page.title() == "LaMDA"  # no markup has run
    page.close()


def say(page, text, replies=1):
    page.fill("#input", text)
    page.keyboard.press("Enter")
    explained = page.locator(".assistant:not(.waiting) > details:last-child")
    sync_api.expect(explained).to_have_count(replies, timeout=30_000)
    sync_api.expect(page.locator("#send")).to_be_enabled()


def picture(page, name):
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"{name}.png"))


def test_a_model_answers_and_its_candidates_are_shown(page):
    say(page, "the of and")
    assert page.locator(".assistant").count() == 1
    assert page.locator(".candidates > li").count() == 4
    assert page.locator(".candidates meter").count() == 16
    say(page, "to in", replies=2)
    assert page.locator(".user").count() == 2
    page.click("#reset")
    assert page.locator(".message").count() == 0


def test_scores_what_was_dropped_steps_and_sources_are_shown(page):
    say(page, "nadal")
    assert page.locator(".assistant > .text").inner_text() == "He is 35 years old."
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator("summary").all_inner_texts() == ["Research: 3 queries", "3 candidates, 1 dropped"]
    assert page.locator("li.chosen .text").inner_text() == "He is 31 years old right now."
    assert page.locator("li.dropped .reason").inner_text() == "P(unsafe) 0.970 is above 0.5"
    first = page.locator("li.chosen meter").evaluate_all("bars => bars.map(bar => bar.value)")
    assert first == pytest.approx([0.93, 0.81, 0.34, 0.02])
    assert "no results" in page.locator(".steps").inner_text()
    picture(page, "light")


def test_sources_are_links_only_where_they_lead_to_the_web(page):
    say(page, "nadal")
    assert page.locator(".sources li").all_inner_texts() == list(FOUND.sources)
    assert page.locator(".sources a").all_inner_texts() == ["https://example.org/nadal"]
    assert set(page.locator("a").evaluate_all("links => links.map(link => link.protocol)")) == {"https:"}
    assert all("noopener" in rel for rel in page.locator("a").evaluate_all("links => links.map(link => link.rel)"))


def test_markup_that_is_typed_or_generated_stays_text(page):
    say(page, MARKUP)
    say(page, "echo", replies=2)
    say(page, "nadal", replies=3)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.locator(".user .text").first.inner_text() == MARKUP
    assert page.locator(".assistant > .text").nth(1).inner_text() == MARKUP
    assert page.locator(".candidates .text").filter(has_text=MARKUP).count() >= 2
    assert page.locator(".steps .text").filter(has_text=MARKUP).count() == 2
    assert page.locator("main img, main script").count() == 0
    assert page.locator("img").count() == 0


def test_a_refusal_is_marked_as_one(page):
    say(page, "refuse")
    assert page.locator(".assistant > .text").inner_text() == REFUSAL
    assert "The filter dropped every candidate" in page.locator(".assistant .note").inner_text()


def test_a_conversation_that_has_grown_sends_its_end(page):
    def sent(count, size):
        said = f"Array.from({{length: {count}}}, (_, n) => ({{role: 'user', content: n + 'x'.repeat({size})}}))"
        return [int(each["content"].split("x")[0]) for each in json.loads(page.evaluate(f"bodyOf({said})"))["messages"]]

    assert sent(20, 100) == [*range(20)]
    for count, size in ((3000, 10), (500, 4000)):
        numbers = sent(count, size)
        assert numbers == [*range(count - len(numbers), count)]
        assert 40 < len(numbers) < 1000
    assert sent(2, 900_000) == [1]


def test_the_keyboard_is_enough(page):
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    say(page, "refuse")
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1


def test_escape_stops_a_request_and_gives_the_message_back(page):
    page.fill("#input", "wait")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:not([hidden])")
    page.keyboard.press("Escape")
    page.wait_for_selector(".note")
    assert page.input_value("#input") == "wait"
    assert page.locator(".user, .assistant").count() == 0


@pytest.mark.parametrize(("name", "scheme", "width"), [("dark", "dark", 900), ("narrow", "light", 400)])
def test_dark_and_narrow_screens(browser, address, name, scheme, width):  # noqa: F811
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(address)
    sync_api.expect(page.locator("#model")).to_have_text("tiny")
    say(page, "nadal")
    for summary in page.locator("summary").all():
        summary.click()
    picture(page, name)
    brightness = sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))
    assert (brightness < 200) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(
        "[...document.querySelectorAll('main *')].every(e => e.getBoundingClientRect().right <= innerWidth)"
    )
    page.close()


def test_a_server_with_a_key_asks_for_it(browser, service):  # noqa: F811
    for address in _serve(service, key="open sesame"):
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-form:not([hidden])")
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-form", state="hidden")
        say(page, "refuse")
        assert page.locator(".assistant > .text").inner_text() == REFUSAL
        page.close()
