"""What must survive a restart survives it."""

import json

import pytest

from lamda.config.errors import UserError
from lamda.data.lanes import Cursor
from lamda.data.windows import SourceOrder, Window
from lamda.storage.state import RunState

CURSOR = Cursor(file=2, line=40, byte=2**33, token=5, lines=41, bad=1, digest="d")
WINDOW = Window(3, 1, 2**40, 900, 5, 2**32, (CURSOR, Cursor()), (7, 0), (CURSOR, CURSOR))

STATE = RunState(
    step=7,
    updates=6,
    consumed=2**40 + 1,
    samples=224,
    tokens=57344,
    skipped=((10, 20), (32, 48)),
    order=(SourceOrder((WINDOW,), (2**40, 3)), SourceOrder()),
    fingerprint={"files": [["a", 1, None]], "weights": [0.1, 1 / 3], "seed": 0},
    wandb_id="0badcafe",
)


def test_a_state_comes_back_from_its_file_as_it_was(tmp_path):
    STATE.write(tmp_path / "state.json")
    back = RunState.read(tmp_path / "state.json")
    assert back == STATE
    assert isinstance(back.order[0].windows[0].starts[1], Cursor)
    assert isinstance(json.loads((tmp_path / "state.json").read_text()), dict)


def test_a_new_state_comes_back_too(tmp_path):
    RunState().write(tmp_path / "state.json")
    assert RunState.read(tmp_path / "state.json") == RunState()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("counts", [7, 1.5]),
        ("counts", [7, True]),
        ("counts", [7, -1]),
        ("counts", [7, 1 << 63]),
        ("counts", [7]),
        ("counts", 7),
        ("base", "900"),
        ("until", None),
        ("starts", [[2, 40, 0, 0, 0, 0, None]]),
        ("starts", [[2, 40], [2, 40]]),
        ("afters", [[2, 40, 0, 0, 0, 0, 5], [2, 40, 0, 0, 0, 0, None]]),
        ("afters", [[], []]),
        ("other", 1),
    ],
)
def test_a_state_with_a_window_of_another_form_is_refused(tmp_path, name, value):
    path = tmp_path / "state.json"
    STATE.write(path)
    content = json.loads(path.read_text())
    content["order"][0]["windows"][0][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a run state of this version"):
        RunState.read(path)


@pytest.mark.parametrize("measured", [[4, 0], [4], [4, 1.0], None])
def test_a_state_with_another_measure_is_refused(tmp_path, measured):
    path = tmp_path / "state.json"
    STATE.write(path)
    content = json.loads(path.read_text())
    content["order"][0]["measured"] = measured
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a run state of this version"):
        RunState.read(path)


def test_a_refused_step_counts_and_consumes_but_is_no_update():
    done = STATE.after(consumed=2**40 + 33, rows=32, updated=True).with_targets(8192)
    refused = STATE.after(consumed=2**40 + 33, rows=32, updated=False).with_targets(8192)
    assert (done.step, done.consumed, done.samples, done.tokens) == (8, 2**40 + 33, 256, 65536)
    assert (done.updates, refused.updates) == (7, 6)
    assert refused.step == 8
    assert (done.order, done.skipped, done.fingerprint, done.wandb_id) == (
        STATE.order, STATE.skipped, STATE.fingerprint, "0badcafe",
    )  # fmt: skip
