"""Published records become the conversations that their formats' rules say; bad ones are refused, all at once."""

import gzip
import json

import pytest
import zstandard

from lamda.config.errors import UserError
from lamda.dialog.convert import convert, main


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
    ("name", "bad", "told"),
    [
        ("topical-chat", {"messages": [{"role": "agent_1", "content": "x", "rating": "Super"}]}, "rating is 'Super'"),
        ("topical-chat", {"messages": [{"role": "bob", "content": "x"}]}, "no text of agent_1 or agent_2"),
        ("hh-rlhf", {"chosen": "x", "rejected": "y"}, "chosen does not begin with a turn"),
        ("hh-rlhf", {"chosen": "\n\nAssistant: a\n\nHuman: b", "rejected": ""}, "does not end with a message of Assis"),
        ("taskmaster", {"utterances": [{"speaker": "X", "text": "y"}]}, "no text of a USER or ASSISTANT"),
        ("oasst1", {"message_id": "1", "role": "bot", "text": "y"}, "role is 'bot'"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "content is no text"),
        ("chat", [], "no list of messages"),
    ],
)
def test_all_bad_records_are_refused_by_file_and_line_and_nothing_is_written(tmp_path, name, bad, told):
    with pytest.raises(UserError) as refused:
        converted(tmp_path, name, [bad, bad])
    assert "in.jsonl, line 1: " in str(refused.value)
    assert "in.jsonl, line 2: " in str(refused.value)
    assert told in str(refused.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_mistakes_on_the_command_line_are_told(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{")
    for words, told in (
        (["topical", "x.jsonl", "-o", "y.jsonl"], "did you mean 'topical-chat'"),
        (["chat", "x.jsonl", "-o", "y.txt"], "name a file that ends in"),
        (["chat", str(tmp_path / "none.jsonl"), "-o", "y.jsonl"], "no such file"),
        (["chat", str(tmp_path / "bad.jsonl"), "-o", "y.jsonl"], "line 1: not JSON"),
    ):
        with pytest.raises(UserError, match=told):
            main(words)


def test_a_program_is_told_how_many_conversations_there_are(tmp_path, capsys):
    record = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello!"}]}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(record)}\n" * 3)
    target = tmp_path / "out.jsonl"
    assert main(["chat", str(tmp_path / "in.jsonl"), "-o", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"file": str(target), "conversations": 3}
