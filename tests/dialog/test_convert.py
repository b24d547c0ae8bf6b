"""Published records become the conversations that their formats' rules say; bad ones are refused, all at once."""

import codecs
import gzip
import json
import re

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.dialog.conversation import parse_conversation
from lamda.dialog.convert import convert, main
from lamda.dialog.formats import FORMATS


def converted(tmp_path, name, records, *, file="in.jsonl", out="out.jsonl"):
    data = json.dumps(records) if file.endswith(".json") else "".join(json.dumps(record) + "\n" for record in records)
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(file.rsplit(".", 1)[-1], bytes)
    (tmp_path / file).write_bytes(pack(data.encode()))
    convert(name, [tmp_path / file], tmp_path / out)
    written = (tmp_path / out).read_bytes()
    unpack = {"gz": gzip.decompress, "zst": zstandard.decompress}.get(out.rsplit(".", 1)[-1], bytes)
    return [json.loads(line)["messages"] for line in unpack(written).splitlines()]


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def test_topical_chat_comes_from_both_sides_with_labels_by_rule(tmp_path):
    knowledge = [["Personal Knowledge"], ["FS1", "Personal Knowledge"], ["AS4"], ["Article"], ["FS2"]]
    ratings = ["Not Good", "Passable", "Good", "Excellent", ""]
    messages = [
        {"role": f"agent_{1 + n % 2}", "content": f"m{n}", "rating": rating, "knowledge": known}
        for n, (rating, known) in enumerate(zip(ratings, knowledge, strict=True))
    ]
    first, second = converted(tmp_path, "topical-chat", [{"messages": messages}], file="a.jsonl.zst", out="b.jsonl.gz")

    def labels(*values):
        return dict(zip(("sensible", "specific", "interesting", "grounded"), values, strict=True))

    assert first == [
        said("assistant", "m0", labels=labels(0, 0, 0, 0)), said("user", "m1"),
        said("assistant", "m2", labels=labels(1, 1, 0, 1)), said("user", "m3"),
        said("assistant", "m4", labels={"grounded": 1}),
    ]  # fmt: skip
    assert [message.get("labels") for message in second] == [None, labels(1, 0, 0, 1), None, labels(1, 1, 1, 0), None]


def test_hh_rlhf_rates_the_last_message_alone(tmp_path):
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"
    record = {"chosen": f"{talk}\n\nAssistant: good", "rejected": f"{talk}\n\nAssistant: bad"}
    empty = {"chosen": f"{talk}\n\nAssistant:", "rejected": f"{talk}\n\nAssistant: x"}
    chosen, rejected, other = converted(tmp_path, "hh-rlhf", [record, empty], out="out.jsonl.zst")
    assert chosen == [
        said("user", "a"), said("assistant", "b"), said("user", "c"), said("assistant", "good", labels={"unsafe": 0}),
    ]  # fmt: skip
    assert rejected[-1] == said("assistant", "bad", labels={"unsafe": 1})
    assert other[-1]["content"] == "x"


def test_taskmaster_joins_what_one_party_says_in_turn(tmp_path):
    utterances = [("USER", "a"), ("USER", "b"), ("ASSISTANT", "c")]
    entries = [{"index": n, "speaker": who, "text": text} for n, (who, text) in enumerate(utterances)]
    (found,) = converted(tmp_path, "taskmaster", [{"conversation_id": "1", "utterances": entries}], file="in.json")
    assert found == [said("user", "a\nb"), said("assistant", "c")]


def test_oasst1_follows_the_best_ranked_answers(tmp_path):
    def row(name, parent, role, rank=None, **more):
        return {"message_id": name, "parent_id": parent, "role": role, "text": f"t{name}", "rank": rank, **more}

    rows = [
        row("2", "1", "assistant", 1), row("1", None, "prompter"), row("3", "1", "assistant", 0),
        row("4", "3", "prompter", 0), row("5", "3", "prompter", 1), row("6", "5", "assistant", 0),
        row("7", "1", "assistant", -1, deleted=True), row("8", None, "prompter"),
    ]  # fmt: skip
    assert converted(tmp_path, "oasst1", rows) == [[said("user", "t1"), said("assistant", "t3")]]
    with pytest.raises(UserError, match=r"line 1: parent_id 'x' is no row's message_id"):
        converted(tmp_path, "oasst1", [row("1", "x", "assistant")])


def test_chat_keeps_what_is_in_our_format(tmp_path):
    messages = [said("user", "<RESPONSE>"), said("assistant", "y", labels={"unsafe": 1}, knowledge=["k"])]
    assert converted(tmp_path, "chat", [{"messages": messages, "id": 3}]) == [messages]


@pytest.mark.parametrize(
    ("name", "bad", "output"),
    [
        ("topical-chat", {"messages": [{"role": "agent_1", "content": "x", "rating": "Super"}]}, "rating is 'Super'"),
        ("topical-chat", {"messages": [{"role": "bob", "content": "x"}]}, "no text of agent_1 or agent_2"),
        ("hh-rlhf", {"chosen": "x", "rejected": "y"}, "chosen does not begin with a turn"),
        ("hh-rlhf", {"chosen": "\n\nAssistant: a\n\nHuman: b", "rejected": ""}, "does not end with a message of Assis"),
        ("taskmaster", {"utterances": [{"speaker": "X", "text": "y"}]}, "no text of a USER or ASSISTANT"),
        ("oasst1", {"message_id": "1", "role": "bot", "text": "y"}, "role is 'bot'"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "content is not text"),
        ("chat", [], "no list of messages"),
        ("taskmaster", {"utterances": [{"speaker": ["USER"], "text": "x"}]}, "no text of a USER or ASSISTANT"),
        ("topical-chat", {"messages": [{"role": "agent_1", "content": "x", "rating": ["Good"]}]}, "rating is ['Good']"),
        (
            "topical-chat",
            {"messages": [{"role": "agent_1", "content": "x", "knowledge": 5}]},
            "knowledge is not a list of texts",
        ),
        (
            "topical-chat",
            {"messages": [{"role": "agent_1", "content": "x", "knowledge": "FS1"}]},
            "knowledge is not a list of texts",
        ),
        ("oasst1", {"message_id": "1", "role": "prompter", "text": "y", "parent_id": ["x"]}, "parent_id is ['x']"),
        ("oasst1", {"message_id": "1", "role": "prompter", "text": "y", "rank": "1"}, "rank is '1', not int or float"),
        ("oasst1", {"message_id": "1", "role": "prompter", "text": "y", "deleted": 1}, "deleted is 1, not bool"),
        ("chat", {"messages": [{"role": "assistant", "content": "x", "to": False}]}, "to is False"),
        ("chat", {"messages": [{"role": "user", "content": "x", "knowledge": {}}]}, "knowledge is not a list of texts"),
        ("chat", {"messages": [{"role": "assistant", "content": "x", "labels": 0}]}, "labels is not a JSON object"),
    ],
)
def test_all_bad_records_are_refused_by_file_and_line_and_nothing_is_written(tmp_path, name, bad, output):
    with pytest.raises(UserError) as refused:
        converted(tmp_path, name, [bad, bad])
    assert "in.jsonl, line 1: " in str(refused.value)
    assert "in.jsonl, line 2: " in str(refused.value)
    assert output in str(refused.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_that_are_their_own_ancestors_are_named(tmp_path):
    def row(name, parent):
        return {"message_id": name, "parent_id": parent, "role": "prompter", "text": "x"}

    rows = [row("1", "3"), row("2", "1"), row("3", "2"), row("4", "1"), row("5", "5"), row("6", None)]
    with pytest.raises(UserError) as refused:
        converted(tmp_path, "oasst1", rows)
    named = [line for line in str(refused.value).splitlines() if "is among its own ancestors" in line]
    assert [line.split(", line ")[1][0] for line in sorted(named)] == ["1", "2", "3", "5"]


def test_lines_that_are_not_json_are_named_with_all_others(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"messages": 3}\n{\n\n[]\nNaN\n')
    with pytest.raises(UserError) as refused:
        convert("chat", [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert [line.split(", line ")[1][0] for line in str(refused.value).splitlines()[:-1]] == ["1", "2", "4", "5"]


def test_a_byte_order_mark_and_nulls_of_other_programs_are_no_fault(tmp_path):
    absent = dict.fromkeys(("name", "tool_calls", "to", "labels", "knowledge"))
    record = {
        "messages": [said("user", "a", **absent), said("assistant", "b", **absent | {"labels": {"unsafe": None}})]
    }
    (tmp_path / "in.jsonl").write_bytes(codecs.BOM_UTF8 + json.dumps(record).encode() + b"\n")
    convert("chat", [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["messages"] == [said("user", "a"), said("assistant", "b")]


def test_the_source_is_never_the_target_and_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"messages": [{"role": "assistant", "content": "x"}]}\n')
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for same in (source, tmp_path / "link.jsonl"):
        with pytest.raises(UserError, match="is a file that is read"):
            convert("chat", [source], same)
    assert source.read_bytes() == before
    (tmp_path / "folder.jsonl").mkdir()
    for bad in (tmp_path / "folder.jsonl", source / "out.jsonl"):
        with pytest.raises(UserError, match="cannot be written"):
            convert("chat", [source], bad)
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lamda.durable.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        convert("chat", [source], target)
    assert target.read_text() == "old"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3)
    | st.sampled_from(["agent_1", "USER", "prompter", "1", "Good", "TS", "\n\nHuman: a\n\nAssistant: b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
SOUND = {
    "topical-chat": {"messages": [
        {"role": "agent_1", "content": "x", "rating": "Good", "knowledge": ["FS1"]},
        {"agent": "agent_2", "message": "y", "rating": "", "knowledge_source": []},
    ]},
    "hh-rlhf": dict.fromkeys(("chosen", "rejected"), "\n\nHuman: a\n\nAssistant: b"),
    "taskmaster": {"utterances": [{"speaker": "USER", "text": "x"}, {"speaker": "ASSISTANT", "text": "y"}]},
    "oasst1": {"message_id": "1", "parent_id": None, "role": "assistant", "text": "x", "rank": 1, "deleted": False,
               "review_result": True},
    "chat": {"messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "x", "to": "TS", "labels": {"unsafe": 0}, "knowledge": ["k"]},
    ]},
}  # fmt: skip


def _places(value, place=()):
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))


def _with(value, place, other):
    if not place:
        return other
    copy = value.copy()
    copy[place[0]] = _with(value[place[0]], place[1:], other)
    return copy


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_in_any_field_converts_or_is_refused_by_file_and_line(tmp_path, name, data):
    records = [SOUND[name]]
    for _ in range(data.draw(st.integers(1, 3))):
        record = data.draw(st.sampled_from(records))
        records.append(_with(record, data.draw(st.sampled_from([*_places(record)])), data.draw(JSON)))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    try:
        convert(name, [tmp_path / "in.jsonl"], tmp_path / "out.jsonl")
    except UserError as error:
        *problems, last = str(error).splitlines()
        assert all(re.match(re.escape(f"{tmp_path}/in.jsonl, line ") + "[1-4]: ", problem) for problem in problems)
        assert "nothing was written" in last or "there are no conversations" in last
    else:
        assert [parse_conversation(json.loads(line)) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_mistakes_on_the_command_line_are_reported(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    for words, output in (
        (["topical", "x.jsonl", "-o", "y.jsonl"], "did you mean 'topical-chat'"),
        (["chat", "x.jsonl", "-o", "y.txt"], "name a file that ends in"),
        (["chat", str(tmp_path / "none.jsonl"), "-o", "y.jsonl"], "no such file"),
        (["chat", str(tmp_path / "bad.jsonl"), "-o", "y.jsonl"], "line 1: not JSON"),
    ):
        with pytest.raises(UserError, match=output):
            main(words)


def test_a_program_is_reported_how_many_conversations_there_are(tmp_path, capsys):
    record = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    target = tmp_path / "out.jsonl"
    assert main(["chat", str(tmp_path / "in.jsonl"), "-o", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(target), "conversations": 3}
