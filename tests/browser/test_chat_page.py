"""The chat page in Chromium: what a person does with it."""

# ruff: noqa: F401, F811 - fixtures
from __future__ import annotations

import json

import pytest

from lamda.dialog.speaker import REFUSAL
from tests.browser.chat_page import (
    FOUND,
    Prepared,
    address,
    answered,
    ask,
    expect,
    kept,
    open_history,
    page,
    service,
    unfold,
    visit,
)
from tests.chromium import browser
from tests.serve.conftest import serving


def test_a_model_answers_and_its_candidates_are_shown(page):
    ask(page, "the of and")
    unfold(page)
    expect(page.locator(".candidates > li")).to_have_count(4)
    expect(page.locator(".candidates meter")).to_have_count(16)
    ask(page, "to in", replies=2)
    expect(page.locator(".candidates")).to_be_visible()  # what was unfolded stays so
    expect(page.locator(".user")).to_have_count(2)
    page.click("#new")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator(".empty")).to_contain_text("the best of 4 candidates: the model rates them itself; no filter")


def test_a_text_that_may_be_shown_appears_word_by_word(page):
    page.fill("#input", "stream")
    page.keyboard.press("Enter")
    for shown in ("One", "One two", "One two three"):
        expect(page.locator(".pending .text")).to_have_text(shown)
        Prepared.go_on.set()
    answered(page)
    expect(page.locator(".assistant > .text")).to_have_text("One two three")


def test_progress_is_shown_while_nothing_else_may_be(page):
    page.fill("#input", "wait")
    page.keyboard.press("Enter")
    expect(page.locator(".progress")).to_contain_text("5 of 16 candidates finished, 312 tokens")
    expect(page.locator(".progress")).to_contain_text("The best appears when all are rated.")
    assert page.locator("progress").evaluate("bar => bar.value / bar.max") == 5 / 16
    page.keyboard.press("Escape")


def test_stopping_keeps_the_message_apart_from_the_conversation(page):
    page.fill("#input", "wait")
    page.keyboard.press("Enter")
    page.click("#stop")
    expect(page.locator(".problem")).to_contain_text("Stopped.")
    ask(page, "the of")
    assert Prepared.read == ["the of"]
    expect(page.locator(".user .text")).to_have_text(["wait", "the of"])


def test_what_was_written_before_a_stop_stays_and_is_said(page):
    page.fill("#input", "stream")
    page.keyboard.press("Enter")
    expect(page.locator(".pending .text")).to_have_text("One")
    page.keyboard.press("Escape")
    answered(page)
    expect(page.locator(".assistant")).to_contain_text("Stopped.")
    ask(page, "the of", replies=2)
    assert Prepared.read == ["stream", "One", "the of"]


def test_another_conversation_is_opened_while_one_is_answered(page):
    ask(page, "nadal")
    page.fill("#input", "wait")
    page.keyboard.press("Enter")
    expect(page.locator(".progress")).to_be_visible()
    page.keyboard.press("Alt+n")
    expect(page.locator("#send")).to_be_visible()
    ask(page, "refuse")
    open_history(page)
    page.locator("#conversations .name").nth(1).click()
    expect(page.locator(".user .text")).to_have_text(["nadal", "wait"])
    expect(page.locator(".problem")).to_contain_text("Stopped.")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".progress")).to_be_visible()
    open_history(page)
    page.locator("#conversations button", has_text="Delete").first.click()
    expect(page.locator("#conversations .name")).to_have_text(["refuse"])
    page.keyboard.press("Escape")
    open_history(page)
    expect(page.locator("#conversations .name")).to_have_text(["refuse"])


def test_a_request_that_fails_can_be_repeated(page):
    page.fill("#input", "fail")
    page.keyboard.press("Enter")
    expect(page.locator(".problem .reason")).to_have_text("64 requests are in progress: try again soon.")
    page.get_by_role("button", name="Edit message").click()
    page.get_by_role("textbox", name="Edited message").fill("nadal")
    page.keyboard.press("Enter")
    answered(page)
    expect(page.locator(".user .text")).to_have_text(["nadal"])


def test_half_a_reply_is_not_taken_for_a_whole_one(page):
    event = {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": None}]}
    half = f"data: {json.dumps(event)}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=half, content_type="text/event-stream"))
    ask(page, "the of")
    expect(page.locator(".assistant > .text")).to_have_text("Half")
    expect(page.locator(".problem")).to_have_text("The connection ended before the reply was complete.")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body="<b>502</b>", status=502))
    page.get_by_role("button", name="Regenerate reply").click()
    expect(page.locator(".problem")).to_have_text("The server answered 502.")


def test_a_reply_is_regenerated_and_both_are_kept(page):
    ask(page, "seed")
    first = page.locator(".assistant > .text").inner_text()
    page.get_by_role("button", name="Regenerate reply").click()
    expect(page.locator(".versions")).to_have_text("‹2 of 2")
    second = page.locator(".assistant > .text").inner_text()
    assert first != second
    page.get_by_role("button", name="Previous version").click()
    expect(page.locator(".assistant > .text")).to_have_text(first)
    ask(page, "the of", replies=2)
    assert Prepared.read == ["seed", first, "the of"]


def test_a_message_is_edited_and_what_follows_it_goes(page):
    for number, text in enumerate(("nadal", "the of", "to in"), start=1):
        ask(page, text, replies=number)
    page.locator(".turn").nth(1).hover()
    page.get_by_role("button", name="Edit message").nth(1).click()
    expect(page.locator(".editor")).to_contain_text("Sending it removes the turn below.")
    page.keyboard.press("Escape")
    expect(page.locator(".user .text")).to_have_text(["nadal", "the of", "to in"])
    page.keyboard.press("Enter")  # Edit has the focus again
    page.get_by_role("textbox", name="Edited message").fill("other")
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(2)
    answered(page, 2)
    assert Prepared.read == ["nadal", FOUND.text, "other"]


def test_replies_and_messages_are_copied(page):
    ask(page, "nadal")
    page.get_by_role("button", name="Copy reply").click()
    expect(page.get_by_role("button", name="Copy reply")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == FOUND.text
    page.get_by_role("button", name="Copy message").click()
    expect(page.get_by_role("button", name="Copy message")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "nadal"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # http from another machine
    page.get_by_role("button", name="Copy reply").click()
    expect(page.get_by_role("button", name="Copy reply")).to_have_text("Copied")


def test_scores_what_was_dropped_and_steps_are_shown(page):
    ask(page, "nadal")
    expect(page.locator("summary")).to_have_text(["Research: 3 queries", "4 candidates, 2 dropped"])
    unfold(page)
    expect(page.locator("li.chosen .text")).to_have_text("He is 31 years old right now.")
    reasons = page.locator("li.dropped .reason").all_inner_texts()
    assert reasons == ["P(unsafe) 0.970 is above 0.5", "its scores are not finite"]
    first = page.locator("li.chosen meter").evaluate_all("bars => bars.map(bar => bar.value)")
    assert first == pytest.approx([0.93, 0.81, 0.34, 0.02])
    expect(page.locator(".steps")).to_contain_text("No results")
    expect(page.locator("details").last).to_contain_text("Sampled with seed")


def test_sources_are_footnotes_and_links_only_where_they_lead_to_the_web(page):
    ask(page, "nadal")
    expect(page.locator(".assistant > .text")).to_have_text(f"{FOUND.text}123")
    expect(page.locator(".sources .source")).to_have_text(list(FOUND.sources))
    expect(page.locator(".sources li").first).to_contain_text("Rafael Nadal / Age / 35")
    expect(page.locator(".sources a")).to_have_text(["https://example.org/nadal"])
    links = page.locator("a[target]")
    assert set(links.evaluate_all("links => links.map(link => link.protocol)")) == {"https:"}
    assert all("noopener" in rel for rel in links.evaluate_all("links => links.map(link => link.rel)"))
    page.get_by_role("link", name="Source 3").click()
    expect(page.locator(".sources li:target")).to_contain_text("docs/a.md:3")


def test_a_refusal_and_what_was_not_read_are_said(page):
    ask(page, "refuse")
    expect(page.locator(".assistant > .text")).to_have_text(REFUSAL)
    expect(page.locator(".assistant")).to_contain_text("The filter dropped every candidate.")
    ask(page, "long", replies=2)
    expect(page.locator(".assistant").last).to_contain_text("it did not read the oldest 3 messages")
    expect(page.locator(".assistant").last).to_contain_text("it read only the end of it")


def test_settings_and_system_text_reach_the_server_and_stay(page):
    bodies = []
    page.on("request", lambda asked: bodies.append(asked.post_data_json) if asked.method == "POST" else None)
    page.click("#open-settings")
    for name, value in (("Temperature", "0.5"), ("Candidates", "2"), ("Seed", "7"), ("System text", "Be brief.")):
        page.get_by_label(name, exact=True).fill(value)
    page.keyboard.press("Escape")
    ask(page, "the of")
    sent = {name: bodies[0].get(name) for name in ("temperature", "candidates", "seed")}
    assert sent == {"temperature": 0.5, "candidates": 2, "seed": 7}
    assert Prepared.read == ["Be brief.", "the of"]
    expect(page.locator(".system")).to_have_text("System text: Be brief.")
    expect(page.locator("summary")).to_have_text("2 candidates")
    page.get_by_role("button", name="Regenerate reply").click()
    expect(page.locator(".versions")).to_be_visible()
    assert bodies[1]["seed"] == 8
    kept(page, 2)
    page.reload()
    answered(page)
    page.keyboard.press("Alt+s")
    assert [page.input_value(f"#{name}") for name in ("temperature", "candidates", "seed", "system")] == [
        "0.5", "2", "7", "Be brief.",
    ]  # fmt: skip
    page.fill("#candidates", "900")
    page.fill("#seed", "")
    page.keyboard.press("Escape")
    ask(page, "to in", replies=2)
    assert "candidates" not in bodies[2]
    assert bodies[2]["seed"] != 7


def test_history_is_kept_opened_and_deleted(page):
    ask(page, "nadal")
    kept(page, 1)
    page.click("#new")
    ask(page, "the of")
    kept(page, 1)
    page.reload()
    expect(page.locator(".user .text")).to_have_text("the of")
    open_history(page)
    titles = page.locator("#conversations .name")
    expect(titles).to_have_text(["the of", "nadal"])
    titles.nth(1).click()
    expect(page.locator(".user .text")).to_have_text("nadal")
    unfold(page)
    expect(page.locator(".candidates > li")).to_have_count(4)
    ask(page, "to in", replies=2)
    kept(page, 1, 1)
    open_history(page)
    expect(titles).to_have_text(["nadal", "the of"])
    page.get_by_role("button", name="Delete: the of").click()
    expect(titles).to_have_count(1)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(page.locator(".turn")).to_have_count(0)
    open_history(page)
    expect(page.locator("#conversations")).to_have_text("None yet.")


def test_a_conversation_that_another_tab_continued_is_shown_as_it_is(page):
    ask(page, "nadal")
    kept(page, 1)
    other = page.context.new_page()
    other.goto(page.url)
    answered(other)
    ask(other, "the of", replies=2)
    kept(other, 1, 1)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator(".user .text")).to_have_text(["nadal", "the of"])


def test_a_conversation_that_has_grown_sends_its_end_and_the_system_text(page):
    def sent(count, text):
        said = f"Array.from({{length: {count}}}, (_, n) => ({{role: 'user', content: n + {text}}}))"
        messages = f"[{{role: 'system', content: 's'}}, ...{said}]"
        body = page.evaluate(f"import('/static/client.js').then(client => client.bodyOf({messages}, {{}}))")
        first, *others = json.loads(body)["messages"]
        assert first["content"] == "s"
        return [int(each["content"].split("x")[0]) for each in others]

    assert sent(20, "'x'") == [*range(20)]
    for count, text in ((3000, "'x'"), (500, "'x'.repeat(4000)"), (500, "'x' + ','.repeat(400)")):
        numbers = sent(count, text)
        assert numbers == [*range(count - len(numbers), count)]
        assert 40 < len(numbers) < 1000
    assert sent(2, "'x'.repeat(900000)") == [1]


def test_a_server_with_a_key_asks_for_it(browser, service):
    with serving(service, key="open sesame") as address:
        page = browser.new_page()
        page.goto(address)
        for key in ("wrong", "open sesame"):
            expect(page.locator("#key-form")).to_be_visible()
            page.fill("#key", key)
            page.keyboard.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        ask(page, "refuse")
        expect(page.locator(".assistant > .text")).to_have_text(REFUSAL)
        page.close()
