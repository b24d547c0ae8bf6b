"""The chat page in Chromium: for every reader and screen, and against what a model, a user or a storage may contain."""

# ruff: noqa: F401, F811 - fixtures
from __future__ import annotations

import re

import pytest

from tests.browser.chat_page import (
    FOUND,
    MARKUP,
    address,
    answered,
    ask,
    expect,
    open_history,
    page,
    picture,
    service,
    unfold,
    visit,
)
from tests.chromium import CONTRASTS, browser

LOOKS = [("light", 1280), ("dark", 1280), ("light", 390), ("dark", 390)]
CONTROLS = "a[href], button, input, textarea, summary"
TEXTS = [
    "h1", "h2", "#model", ".text", ".note", ".reason", ".place", ".score span", "summary", ".source", ".quote",
    "button", "dialog label", ".keys dt", ".keys dd",
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_nothing_hangs_out_and_all_text_stands_out(visit, scheme, width):
    page = visit(scheme=scheme, width=width, is_phone=width < 500)
    picture(page, f"empty-{scheme}-{width}")
    page.fill("#input", "How old is Rafael Nadal?")
    ask(page, "nadal")
    picture(page, f"reply-{scheme}-{width}")
    unfold(page)
    page.evaluate("document.documentElement.scrollTop = 0")
    picture(page, f"why-{scheme}-{width}")
    color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", color)[:3])) < 200) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    every = "[...document.querySelectorAll('main *, header *, footer *')]"
    assert page.evaluate(f"{every}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    if width < 500:
        heights = page.evaluate(f"{every}.filter(e => e.matches('button')).map(e => e.getBoundingClientRect().height)")
        assert min(height for height in heights if height) >= 24
    contrasts = page.evaluate(CONTRASTS, TEXTS)
    assert set(contrasts) == set(TEXTS)
    assert min(contrasts.values()) >= 4.5, contrasts
    for name in ("settings", "history"):
        page.click(f"#open-{name}")
        expect(page.locator(f"#{name}")).to_be_visible()
        picture(page, f"{name}-{scheme}-{width}")
        box = page.locator(f"#{name}").bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
        page.keyboard.press("Escape")


MARKED = "all.filter(e => e.checkVisibility() && !e.disabled).map((e, n) => (e.dataset.number = n, e.outerHTML))"


@pytest.mark.parametrize(("keys", "within"), [("", "body"), ("Alt+s", "#settings"), ("Alt+h", "#history")])
def test_every_control_is_reached_by_tab_and_has_a_name(page, keys, within):
    ask(page, "seed")
    page.get_by_role("button", name="Regenerate reply").click()
    expect(page.locator(".versions")).to_have_text("‹2 of 2")
    ask(page, "nadal", replies=2)
    unfold(page)
    if keys:
        page.keyboard.press(keys)
        expect(page.locator(within)).to_be_visible()
    controls = page.locator(within).locator(CONTROLS).evaluate_all(f"all => {MARKED}")
    reached = set()
    for _ in range(len(controls) + 2):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.number"))
    missed = [html for number, html in enumerate(controls) if str(number) not in reached]
    assert missed == []
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "textbox", "spinbutton", "DisclosureTriangle", "meter", "progressbar", "dialog", "main"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"] and node.get("role", {}).get("value") in roles
    ]
    assert len([role for role, _ in named if role not in ("meter", "dialog", "main")]) >= len(controls)
    assert [role for role, name in named if not name.strip()] == []


def test_names_of_buttons_begin_with_what_is_seen_and_ids_are_unique(page):
    ask(page, "nadal")
    labels = page.locator("button[aria-label]").evaluate_all("all => all.map(e => [e.textContent, e.ariaLabel])")
    assert [(text, label) for text, label in labels if text.isalpha() and not label.startswith(text)] == []
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_the_keyboard_is_enough(page):
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#input") == "one\ntwo"
    ask(page, "seed")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Alt+r")
    expect(page.locator(".versions")).to_have_text("‹2 of 2")
    page.keyboard.press("Alt+w")
    expect(page.locator(".candidates")).to_be_visible()
    page.focus("#input")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    page.keyboard.type("s")
    page.keyboard.press("Escape")
    expect(page.locator(".user .text")).to_have_text("seed")
    page.keyboard.press("Alt+n")
    expect(page.locator(".turn")).to_have_count(0)
    page.keyboard.press("Alt+h")
    expect(page.locator("#history")).to_be_visible()
    page.keyboard.press("Enter")  # the first conversation has the focus
    expect(page.locator(".user .text")).to_have_text("seed")


def test_a_screen_reader_is_told_of_the_reply_once(page):
    said = (
        "(window.said = [], new MutationObserver(() => said.push(document.querySelector('[role=status]').textContent))"
    )
    page.evaluate(f"{said}.observe(document.querySelector('[role=status]'), {{childList: true}}))")
    ask(page, "nadal")
    page.wait_for_function("said.length >= 2")
    assert page.evaluate("said") == ["Waiting for the reply.", f"Reply: {FOUND.text}"]


def test_markup_that_is_typed_or_generated_stays_text(page):
    for number, text in enumerate((MARKUP, "echo", "nadal"), start=1):
        ask(page, text, replies=number)
    unfold(page)
    expect(page.locator(".user .text").first).to_have_text(MARKUP)
    expect(page.locator(".assistant > .text").nth(1)).to_have_text(MARKUP)
    expect(page.locator(".candidates .text").filter(has_text=MARKUP)).to_have_count(2)
    expect(page.locator(".steps .text").filter(has_text=MARKUP)).to_have_count(2)
    open_history(page)
    expect(page.locator("#conversations .name")).to_have_text(MARKUP[:80])


def test_hidden_characters_are_seen_and_copied_as_they_are_seen(page):
    ask(page, "hidden")
    expect(page.locator(".assistant > .text")).to_have_text(r"safe\x1b[31m \u202egnp.exe")
    page.get_by_role("button", name="Copy reply").click()
    expect(page.get_by_role("button", name="Copy reply")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == r"safe\x1b[31m \u202egnp.exe"


def test_the_policy_lets_no_text_become_markup_or_script(browser, address):
    page = browser.new_page()
    page.goto(address)
    attempts = ("document.body.innerHTML = '<b>x</b>'", "document.write('x')", "setTimeout('document.title = 1')")
    for attempt in attempts:
        outcome = page.evaluate(f"() => {{ try {{ {attempt}; return 'done' }} catch (error) {{ return error.name }} }}")
        assert outcome in ("TypeError", "EvalError"), attempt
    page.close()


STORED = {
    "id": "0123456789abcdef", "changed": "soon", "system": ["x"], "extra": MARKUP,
    "turns": [
        7, None, {"user": {"toString": 1}}, {"user": "no replies", "replies": "x", "shown": 4},
        {"user": MARKUP, "shown": 99, "problem": {}, "replies": [
            None, {"text": 3},
            {"text": MARKUP, "end": MARKUP, "seed": MARKUP, "temperature": {}, "reasons": {
                "candidates": [None, {"text": MARKUP, "value": "x", "rank": MARKUP, "dropped": MARKUP,
                                      "scores": {MARKUP: 1, "__proto__": 2, "unsafe": "high"}}],
                "steps": [{"to": "TS", "text": MARKUP, "results": [{"text": MARKUP, "source": "javascript:alert(1)"}]}],
                "sources": ["javascript:document.title='broken'", "data:text/html,x", 5, "https://exa\u202emple.org/"],
                "refused": "yes", "context": {"messages_left_out": MARKUP, "system_cut": True}}}]},
    ],
}  # fmt: skip
PUT = """record => new Promise((resolve, reject) => {
  const opening = indexedDB.open("lamda", 1);
  opening.onsuccess = () => {
    const writing = opening.result.transaction("conversations", "readwrite");
    for (const each of [record, {id: "x"}, {id: 5, turns: []}, {id: ["0123456789abcdef"], turns: []}]) {
      writing.objectStore("conversations").put(each);
    }
    writing.oncomplete = resolve;
    writing.onerror = () => reject(writing.error);
  };
})"""


def test_a_hostile_history_is_text_or_left_out(page):
    page.evaluate(PUT, STORED)
    page.evaluate('localStorage.setItem(\'lamda-settings\', \'{"temperature": "<b>", "candidates": -4, "seed": 9}\')')
    page.goto(f"{page.url}?c=0123456789abcdef")
    expect(page.locator(".user .text")).to_have_text(["no replies", MARKUP])
    expect(page.locator(".assistant > .text")).to_contain_text(MARKUP)
    notes = page.locator(".assistant > .note")
    expect(notes).to_have_text("The system text is longer than what the model reads: it read only the beginning of it.")
    unfold(page)
    expect(page.locator("main a[target]")).to_have_count(0)
    open_history(page)
    expect(page.locator("#conversations li")).to_have_count(1)
    page.keyboard.press("Escape")
    page.click("#open-settings")
    assert [page.input_value(f"#{name}") for name in ("temperature", "candidates", "seed")] == ["", "", "9"]
    page.keyboard.press("Escape")
    ask(page, "the of", replies=2)


def test_without_storage_the_page_works_and_says_what_it_cannot(browser, address):
    page = browser.new_page()
    page.add_init_script(
        "indexedDB.open = () => { const opening = {error: new Error('no storage')};"
        " setTimeout(() => opening.onerror()); return opening; };"
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no storage') }});"
    )
    page.goto(address)
    ask(page, "nadal")
    expect(page.get_by_role("alert")).to_contain_text("cannot keep the conversation (no storage)")
    ask(page, "refuse", replies=2)
    page.close()
