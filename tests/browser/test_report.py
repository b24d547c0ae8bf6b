"""A report in Chromium: what it shows, light and dark, wide and narrow, and that it asks no network for anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from lamda.cli import main
from tests.chromium import CONTRASTS, PICTURES, browser, sync_api  # noqa: F401 - a fixture
from tests.runs.conftest import save_checkpoint
from tests.runs.test_report import MARKUP, write_run

LOOKS = [("light", 1400), ("dark", 1400), ("light", 380), ("dark", 380)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report of one run and one of two, by name."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [write_run(folder / name, status=status) for name, status in (("one", "failed"), ("other", "finished"))]
    save_checkpoint(runs[0], 200, {})
    for name, chosen in (("one", runs[:1]), ("both", runs)):
        assert main(["report", *map(str, chosen), "-o", str(folder / f"{name}.html")]) == 0
    return folder


@pytest.fixture
def visit(browser, reports):  # noqa: F811
    """Opens a report; afterwards nobody may have complained, and nothing but the file may have been asked for."""
    pages, complaints, asked = [], [], []

    def open_page(name, *, scheme="light", width=1400):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((reports / f"{name}.html").as_uri())
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        assert "LaMDA" in page.title(), "no markup has run"
        page.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", reports.as_uri()))] == []
    assert len([url for url in asked if url.startswith("file:")]) == len(pages)


@pytest.mark.parametrize(("scheme", "width"), LOOKS)
def test_every_panel_is_seen_in_light_and_dark_on_a_desk_and_on_a_phone(visit, scheme, width):
    page = visit("one", scheme=scheme, width=width)
    charts = page.locator("figure")
    sync_api.expect(charts).to_have_count(9)
    for number in range(9):
        chart = charts.nth(number)
        sync_api.expect(chart.locator("h3")).to_be_visible()
        sync_api.expect(chart.locator("path.line").first).to_be_attached()
        box = chart.locator("svg").bounding_box()
        assert box["width"] > 200
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing hangs out at the right"
    for message in ("failed", f"because {MARKUP}", "step-00000200"):
        sync_api.expect(page.get_by_text(message, exact=True).first).to_be_visible()
    sizes = page.evaluate("[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) > 7
    if PICTURES:
        page.screenshot(path=str(Path(PICTURES) / f"report-{scheme}-{width}.png"), full_page=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_what_is_behind_them(visit, scheme):
    page = visit("both", scheme=scheme)
    names = ["h1", "h2", "h2 small", "dt", "th", "figcaption span", "svg text", ".status", "path.line", "footer"]
    contrasts = page.evaluate(CONTRASTS, names)
    assert {"h1", "h2", "dt", "svg text", ".status", "path.line"} - set(contrasts) <= {"dt"}
    for what, contrast in contrasts.items():
        assert contrast >= (3.0 if what == "path.line" else 4.5), (what, contrast)


def test_a_pointer_finds_the_values_below_it(visit):
    page = visit("one")
    chart = page.locator("figure").first
    values = chart.locator(".values")
    sync_api.expect(values).to_be_hidden()
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] / 2)
    sync_api.expect(values).to_have_text("113,000 tokens: 5.74")
    sync_api.expect(chart.locator(".pointer")).to_have_attribute("visibility", "visible")
    page.mouse.move(0, 0)
    sync_api.expect(values).to_be_hidden()


def test_what_is_folded_opens_and_what_a_run_wrote_stays_text(visit):
    page = visit("one")
    page.get_by_text("Configuration", exact=True).click()
    sync_api.expect(page.get_by_text("global_batch_size")).to_be_visible()
    sync_api.expect(page.locator("pre").first).to_contain_text(MARKUP)
    sync_api.expect(page.locator("img")).to_have_count(0)


def test_runs_side_by_side_are_reported_apart_in_each_chart(visit):
    page = visit("both")
    sync_api.expect(page.locator("figure").first.locator(".legend li")).to_have_text(["one", "other"])
    colors = page.evaluate(
        "[...document.querySelector('svg').querySelectorAll('.line')].map(e => getComputedStyle(e).stroke)"
    )
    assert len(set(colors)) == 2
