"""A headless Chromium that talks to nobody of its own accord; tests that use it are skipped where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PICTURES = os.environ.get("LAMDA_PICTURES")
"""A folder for screenshots, for those who want to look at them."""
CONTRASTS = """all => {
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = text => text.match(/[0-9.]+/g).map(Number);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(e).backgroundColor);
      if (a > 0) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const what of all) {
    for (const element of document.querySelectorAll(what)) {
      const style = getComputedStyle(element);
      const own = what === "path.line" ? style.stroke : what === "svg text" ? style.fill : style.color;
      const [one, two] = [light(parse(own)), light(behind(element))].sort((a, b) => b - a);
      found[what] = Math.min(found[what] ?? 99, (one + 0.05) / (two + 0.05));
    }
  }
  return found;
}"""
"""Given selectors: the least contrast (as WCAG defines it) of what each finds with what is behind it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium here (`make serve-test` installs Debian's)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()
