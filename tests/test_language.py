"""The project speaks the field's language: no old word, key or command outside of the tables that read the old ones."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT

FOLDERS = ("lamda", "benchmarks", "scripts", "docs", "configs", "data", "README.md", "CONTRIBUTING.md", "Makefile")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".html", ".js", ".jinja", ".json", ""}

OLD_WORDS = {
    r"\b\w*optimis(e|er|ers|ation)\b": "optimize, optimizer",
    r"\b\w*(initialis|tokenis|normalis|serialis)(e|es|ed|er|ation)\b": "-ize",
    r"\blicences?\b": "license",
    r"\b(colours?|behaviours?|favours?)\b": "American spelling",
    r"\b(befall|befalls|befell)\b": "happen to",
    r"\b(mend|mends|mended)\b": "fix",
    r"\b(anew|midst|whilst|thereof)\b": "again, during, while",
    r"\bfor ever\b(?!y)": "forever",
    r"\bto the last bit\b": "bit for bit",
    r"\btold\b": "reported, printed",
    r"\bodd ranks?\b": "rank that differs",
    r"\b(compare_every|stop_before_end|hang_seconds|max_bad_steps|max_bad_fraction)\b": "the key's current name",
    r"\b(train\.rollbacks|data\.blocks)\b(?! import)(?!\.)": "the key's current name",
    r"\blamda (evaluate|prove-resume|where|runs)\b(?=[ `\n])(?! import)": "the command's current name",
    r"\b(partition_BL|partition_N|nats_BL|scored_BL|token_nats|is_main\b(?=\())": "log_z, nll, loss_mask",
}
ALIASES = {
    "lamda/config/loading.py": "old keys are read",
    "lamda/cli/__init__.py": "old commands are read",
    "lamda/data/card.py": "an old card's key is read",
    "docs/training-log.md": "a log is not rewritten",
}
"""Files that name old words, and why."""


def texts():
    listed = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for name in listed.split():
        path = ROOT / name
        is_record = name.startswith("benchmarks/") and path.suffix == ".json"
        if path.suffix in SUFFIXES and name not in ALIASES and not is_record and path.is_file():
            yield name, path.read_text("utf-8")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")
@pytest.mark.parametrize(("word", "instead"), OLD_WORDS.items())
def test_an_old_word_is_gone(word, instead):
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write {instead}"
        for name, text in texts()
        for match in re.finditer(word, text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", ALIASES)
def test_a_file_that_may_name_old_words_is_there(name):
    assert Path(ROOT / name).is_file()
