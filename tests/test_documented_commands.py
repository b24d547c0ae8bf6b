"""Every command of README and documentation fits the code: options, keys, files. `make docs-test` runs them."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from lamda.cli import COMMANDS
from lamda.cli.completion import options
from lamda.config.errors import UserError
from lamda.config.help import ConfigParser
from lamda.config.loading import KEYS, load_config
from lamda.config.resources import find
from tests.docs.said import PAGES, ROOT, commands, commands_in

LAUNCHER = {"--num_gpus", "--module", "--local_rank"}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def problems(text):
    """What does not fit, in words."""
    for part in text.split(" -- "):
        words = re.sub(r"^([A-Z_]+=\S* )+", "", part).split()
        program, rest = Path(words[0]).name, words[1:]
        check = {"lamda": _lamda, "deepspeed": _script, "python": _script, "pip": _pip, "make": _make}.get(program)
        if check:
            yield from check(rest, part)


def _flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text.replace("--section.key", "")))


def _lamda(words, text):
    name = next((name for name in (" ".join(words[:2]), *words[:1]) if name in COMMANDS), None)
    if name is None:
        if not (words[:1] in (["--help"], ["--version"]) or any(known.split()[0] == words[0] for known in COMMANDS)):
            yield f"there is no command lamda {words[0]}"
        return
    parser = COMMANDS[name].parser()
    takes_keys = isinstance(parser, ConfigParser)
    known = {*options(parser), *(f"--{key}" for key in KEYS if takes_keys), "--help"}
    for flag in sorted(_flags(text) - known):
        yield f"lamda {name} has no option {flag}"
    if takes_keys:
        yield from _configuration(text)


def _script(words, text):
    script = next((word for word in words if word.endswith(".py") or word.startswith("tests/")), None)
    if script and not (ROOT / script.partition("::")[0]).exists():
        yield f"there is no {script}"
    elif script in ("scripts/pretrain.py", "scripts/finetune.py") or "--module" in words:
        for flag in sorted(_flags(text) - LAUNCHER - {f"--{key}" for key in KEYS} - {"--config"}):
            yield f"there is no key {flag}"
        yield from _configuration(text)
    elif script == "scripts/benchmark.py":
        source = (ROOT / f"benchmarks/{words[words.index(script) + 1].replace('-', '_')}.py").read_text("utf-8")
        for flag in sorted(_flags(text) - {f"--{key}" for key in KEYS} - {"--config"}):
            is_field = re.search(rf"^    {flag[2:]}: ", source, re.M)  # `month` has its times' fields as options
            if not is_field and f'"{flag}"' not in source + (ROOT / "benchmarks/__init__.py").read_text("utf-8"):
                yield f"the benchmark has no option {flag}"


def _configuration(text):
    """What `load_config` says of the configuration and the keys of a command without placeholders."""
    words = shlex.split(re.sub(r"[\[\]]", "", text))
    if "--config" not in words:
        return
    given = {}
    for flag, value in pairwise(words):
        if flag == "--config" or flag.removeprefix("--") in KEYS:
            given[flag] = value
    if any(re.fullmatch(r"[A-Z_]+", value) for value in given.values()):
        return
    try:
        load_config([word for pair in given.items() for word in pair])
    except UserError as error:
        yield str(error)


def _pip(words, text):
    for extra in {name.strip() for found in re.findall(r"\[([a-z,]+)\]", text) for name in found.split(",")}:
        if not re.search(rf"^{extra} = \[", PROJECT, re.M):
            yield f"there is no extra {extra}"
    if "-c" in words:
        find(words[words.index("-c") + 1])


def _make(words, text):
    for target in words:
        if "=" not in target and not re.search(rf"^{re.escape(target)}:", MAKEFILE, re.M):
            yield f"make has no target {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_fits_the_code(page):
    found = [f"{said}: {problem}" for said in commands(page) for problem in problems(said.text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lamda pretain --config tiny", "no command lamda pretain"),
        ("lamda plan --config tiny --gpsu 8", "no option --gpsu"),
        ("lamda plan --config tinny", "did you mean 'tiny'"),
        ("deepspeed scripts/pretrain.py --config configs/tiny.yaml --train.lrr 1", "no key --train.lrr"),
        ("deepspeed scripts/pretrain.py --config configs/tiny.yaml --train.lr fast", "train.lr"),
        ("lamda supervise -- deepspeed scripts/pretran.py --config configs/tiny.yaml", "no scripts/pretran.py"),
        ("python scripts/benchmark.py month --gpsu 1", "no option --gpsu"),
        ("pip install 'lamda-pytorch[srve]'", "no extra srve"),
        ("make tset", "no target tset"),
    ],
)
def test_what_does_not_fit_is_found(text, message):
    assert message in "; ".join(problems(text))


def test_commands_are_found_wherever_they_stand():
    text = """\
Say `lamda plan --config FILE`.

<!-- hardware: 8 GPUs -->
```
deepspeed scripts/pretrain.py \\
    --config X.yaml     # all of it
```

    $ lamda list DIR
    lamda is what this printed

```python
lamda is no command here
```

<!-- exit: 2 -->
```
lamda plan
```
"""
    found = commands_in(text, Path("page.md"))
    assert [(said.line, said.text, said.hardware, said.code, said.is_inline) for said in found] == [
        (1, "lamda plan --config FILE", None, None, True),
        (5, "deepspeed scripts/pretrain.py --config X.yaml", "8 GPUs", None, False),
        (9, "lamda list DIR", None, None, False),
        (18, "lamda plan", None, 2, False),
    ]
    assert [said.is_synopsis for said in found] == [True, False, True, False]


def test_links_between_the_files_of_the_repository_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
