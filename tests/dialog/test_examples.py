"""What is learned from a conversation, when, and with which targets; blocks of it that their cursor alone makes."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from lamda.config.errors import UserError
from lamda.config.schema import Config
from lamda.data.blocks import LaneReader, Packing, Part
from lamda.data.card import Source
from lamda.data.corpus import fingerprint, open_corpus
from lamda.data.documents import Document
from lamda.data.files import File
from lamda.data.lanes import Cursor
from lamda.data.partitioning import cut_into_lanes
from lamda.dialog.conversation import ATTRIBUTES, Conversation, Message, parse_conversation
from lamda.dialog.encoding import Encoding
from lamda.dialog.examples import Conversations, Rating, ResearchStep, Response, examples_of
from tests.conftest import WORDS

SOURCE = Source(name="s", license="none", files=("x.jsonl",))
LENGTH = 97


def talk(seed, *, turns=None):
    """A random conversation as a record, with labels, research and texts that spell out sentinels."""
    draw = random.Random(seed)

    def text():
        words = draw.choices([*WORDS, "<RESPONSE>", "SENSIBLE 1", "<end_of_document>", "0"], k=draw.randrange(1, 12))
        return " ".join(words)

    messages = [{"role": "system", "content": text()}] * draw.randrange(2)
    for _ in range(turns or draw.randrange(1, 5)):
        messages.append({"role": "user", "content": text()})
        labels = {name: draw.randrange(2) for name in draw.sample(ATTRIBUTES, draw.randrange(4))}
        messages.append({"role": "assistant", "content": text(), "labels": labels})
        if draw.random() < 0.2:
            messages.append({"role": "assistant", "content": text(), "to": "TS"})
            messages.append({"role": "tool", "content": text()})
            messages.append({"role": "assistant", "content": text()})
    return {"messages": messages}


def lane_of(folder, records, **more):
    form = Conversations(row_length=LENGTH, seed=5, **{"generative": 1, "discriminative": 2, **more})
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    (lane,) = cut_into_lanes(
        SOURCE, [File(str(path), path.stat().st_size)], sequence_length=LENGTH, max_lanes=1, form=form
    )
    return lane


def test_masks_of_ten_thousand_dialogues_are_exact(tokenizer):
    """Targets are the response and its end, or the rating, or a step of research: no other token, and every one."""
    encoding, seen = Encoding(tokenizer), Counter()
    end = [tokenizer.end_of_document]
    for seed in range(10_000):
        generative, ratings = examples_of(parse_conversation(talk(seed)))
        example = random.Random(seed).choice([*generative, *ratings])
        ids, scored = example.encode(encoding, max_tokens=10_000)
        first = scored.index(True)
        assert not any(scored[:first])
        assert all(scored[first:])
        if isinstance(example, Response):
            assert ids[:first] == encoding.context(example.context)
            assert ids[first:] == tokenizer.encode(example.response) + end
        elif isinstance(example, ResearchStep):
            symbol = tokenizer.symbols["TS" if example.action.to == "TS" else "USER"]
            assert ids[first:] == [symbol, *tokenizer.encode(example.action.content), *end]
        else:
            assert ids[first:] == tokenizer.encode(str(int(example.rating)))
            assert ids[first - 1] == tokenizer.symbols[example.kind.upper()]
        seen[type(example)] += 1
    assert min(seen[kind] for kind in (Response, ResearchStep, Rating)) > 500


@pytest.mark.parametrize("blank", ["", "  ", "\n\u3000"])
def test_blank_messages_are_no_targets(blank):
    user, nothing, query = Message("user", "a"), Message("assistant", blank), Message("assistant", blank, to="TS")
    assert examples_of(Conversation((user, nothing)))[0] == []
    last = Message("assistant", "c")
    (step,) = examples_of(Conversation((user, nothing, query, Message("tool", "b"), last)))[0]
    assert (step.action, step.base, step.steps) == (last, blank, ((blank, "b"),))
    with pytest.raises(ValueError, match="nothing to learn"):
        Conversations(row_length=LENGTH, seed=0, generative=1, discriminative=1).text_of(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": blank}]}, SOURCE
        )


def test_bad_messages_are_no_targets_and_the_user_never_hears_research():
    user, base = Message("user", "u"), Message("assistant", "b", labels={"unsafe": True, "sensible": True})
    query, result = Message("assistant", "q", to="TS"), Message("tool", "r")
    other, last = Message("tool", "s"), Message("assistant", "a", labels={"grounded": True})
    generative, ratings = examples_of(Conversation((user, base, query, result, other, last, user, base)))
    assert generative == [
        ResearchStep((user,), "b", (), query),
        ResearchStep((user,), "b", (("q", "r\ns"),), last),
    ]
    assert ratings == [
        Rating((user,), "b", "unsafe", True),
        Rating((user,), "b", "sensible", True),
        Rating((user,), "a", "grounded", True),
        Rating((user, last, user), "b", "unsafe", True),
        Rating((user, last, user), "b", "sensible", True),
    ]
    dull = Message("assistant", "d", labels={"sensible": False})
    assert examples_of(Conversation((user, dull)))[0] == []


def test_over_the_epochs_each_example_comes_once(tokenizer):
    form = Conversations(row_length=10_000, seed=1, generative=2, discriminative=3)
    record, encoding = talk(19, turns=9), Encoding(tokenizer)
    generative, ratings = examples_of(parse_conversation(record))
    assert (len(generative) % 2, len(ratings) % 3) != (0, 0)
    given = [Document(json.dumps(record), "s", 0, 4, 0, epoch=epoch) for epoch in range(len(generative) * len(ratings))]
    found = [form.encode([document], tokenizer)[0] for document in given]
    for kind, count, items in (("generative", 2, generative), ("rating", 3, ratings)):
        own = [example for epoch in found for example in (epoch[:2] if kind == "generative" else epoch[2:])]
        rounds = [
            Counter(tuple(e.ids.tolist()) for e in own[i : i + len(items)]) for i in range(0, len(own), len(items))
        ]
        wanted = Counter(tuple(item.encode(encoding, max_tokens=10_000).ids) for item in items)
        assert len(own) == count * len(given)
        assert all(part == wanted for part in rounds[: len(own) // len(items)])
    assert form.encode(given[:1], tokenizer)[0][0].ids.tolist() == found[0][0].ids.tolist()
    other = [Document(json.dumps(record), "s", 0, line, 0, epoch=0) for line in range(9)]
    assert len({tuple(part[0].ids.tolist()) for part in form.encode(other, tokenizer)}) > 1


@pytest.mark.parametrize("windows", [1, 3, 8])
def test_rows_hold_each_example_whole_and_once_and_come_from_their_cursor_alone(tmp_path, tokenizer, windows):
    records = [talk(seed) for seed in range(30)]
    lane = lane_of(tmp_path, records)
    packing = Packing(LENGTH, "whole")
    for epoch in range(3):
        expected = [
            (line, part)
            for line, record in enumerate(records)
            for part in lane.form.encode([Document(json.dumps(record), "s", 0, line, 0, epoch=epoch)], tokenizer)[0]
        ]
        reader, start, made = LaneReader(lane, tokenizer, packing), Cursor(), []
        for number in range(1, windows + 1):
            part = Part(epoch, start, None if number == windows else lane.axis_length * number // windows)
            made.append((part, reader.read(part)))
            start = made[-1][1].after
        found = []
        for part, (block, tokens, after) in made:
            padding = np.ones(block.ids.shape, bool)
            for span in block.spans:
                place = slice(span["start"], span["start"] + span["length"])
                if span["document"] >= 0:
                    padding[span["row"], place] = False
                    document = block.documents[span["document"]]
                    ids, mask = block.ids[span["row"], place], block.loss_mask[span["row"], place]
                    found.append(((document.line, int(span["token"])), document.domain, ids.tolist(), mask.tolist()))
            assert (block.ids[padding] == tokenizer.padding).all()
            assert not block.loss_mask[padding].any()
            assert block.loss_mask.any(axis=1).all()
            segment_ids = np.repeat(np.arange(len(block.spans)), block.spans["length"]).reshape(block.ids.shape)
            assert (segment_ids[:, :-1] <= segment_ids[:, 1:]).all()
            again = LaneReader(lane, tokenizer, packing).read(part)
            assert np.array_equal(again.block.ids, block.ids)
            assert np.array_equal(again.block.loss_mask, block.loss_mask)
            assert np.array_equal(again.block.spans, block.spans)
            assert again.block.documents == block.documents
            assert (again.tokens, again.after) == (tokens, after)
        found.sort()
        assert [line for (line, _), *_ in found] == [line for line, _ in expected]
        for (_, kind, ids, mask), (_, part) in zip(found, expected, strict=True):
            assert (kind, ids, mask) == (part.domain, part.ids.tolist(), part.loss_mask.tolist())


def test_a_bad_record_is_quarantined_with_its_line_and_reason(tmp_path, tokenizer):
    silent = {"messages": [{"role": "user", "content": "anybody?"}]}
    records = [talk(1), {"text": "raw"}, talk(2), {"messages": [{"role": "bot", "content": "x"}]}, silent, talk(3)]
    lane = lane_of(tmp_path, records)
    reader = LaneReader(lane, tokenizer, Packing(LENGTH, "whole"))
    bad = [(bad.place, bad.reason) for bad in reader.read(Part(0, Cursor(), None)).block.quarantined]
    assert [place for place, _ in bad] == [f"{tmp_path / 'talk.jsonl'}, line {number}" for number in (2, 4, 5)]
    assert [reason.split(",")[0].split(":")[0] for _, reason in bad] == [
        "it has no list of messages", "message 1", "there is nothing to learn",
    ]  # fmt: skip


def test_dialogues_ask_for_whole_packing_and_are_in_the_fingerprint(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(talk(seed)) + "\n" for seed in range(9)))
    data = {"corpus": "standard_library", "files": str(tmp_path / "a.jsonl"), "packing": "whole"}
    config = Config.model_validate({"data": data, "train": {"steps": 1}})
    corpus = open_corpus(config.data, form=Conversations.of(config))
    print_of = fingerprint(corpus, config, tokenizer)
    assert print_of["dialog"] == {"generative": 1, "discriminative": 4}
    with pytest.raises(
        UserError, match=r"data\.packing whole is not for these documents: set it to concat or best_fit"
    ):
        open_corpus(config.data)
    plain = config.data.model_copy(update={"packing": "concat"})
    with pytest.raises(UserError, match="set it to whole"):
        open_corpus(plain, form=Conversations.of(config))
