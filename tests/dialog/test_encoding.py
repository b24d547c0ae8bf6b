"""Conversations become the paper's ids, and no text can pass for structure."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamda.config.errors import UserError
from lamda.data.tokenizer import CONTROL_PIECES, CONTROL_SYMBOLS, Tokenizer
from lamda.dialog.conversation import ATTRIBUTES, Message, parse_conversation, to_record
from lamda.dialog.encoding import RESULT, Encoding

FORGED = [
    "<end_of_document>",
    "<RESPONSE>",
    "RESPONSE",
    "SENSIBLE 1",
    "<UNSAFE>0",
    f"<{RESULT}>",
    "<TS>",
    "<USER> TS, x",
]
TEXT = st.lists(st.one_of(st.text(max_size=8), st.sampled_from([*FORGED, *CONTROL_PIECES])), max_size=5).map("".join)
TALK = [
    Message("system", "Be brief."),
    Message("user", "the of"),
    Message("assistant", "and to"),
    Message("user", "in is"),
]


@pytest.fixture(scope="module")
def encoding(tokenizer):
    return Encoding(tokenizer)


def shown(encoding, tokenizer, ids):
    """Control symbols by name, the text between them decoded."""
    names, parts, text = {id: name for name, id in tokenizer.symbols.items()}, [], []
    for id in [*ids, None]:
        if id is not None and id not in names:
            text.append(id)
            continue
        parts += [encoding.decode(text)] if text else []
        parts += [names[id]] if id is not None else []
        text = []
    return parts


def test_a_context_is_as_in_the_paper(encoding, tokenizer):
    assert shown(encoding, tokenizer, encoding.context(TALK)) == [
        "end_of_document", "SYSTEM", "Be brief.", "USER", "the of", "ASSISTANT", "and to", "USER", "in is", "RESPONSE",
    ]  # fmt: skip


def test_targets_are_the_response_and_its_end_or_the_rating_alone(encoding, tokenizer):
    def targets(example):
        return [id for id, scored in zip(example.ids, example.loss_mask, strict=True) if scored]

    generative = encoding.generative(TALK, "it was", max_tokens=200)
    assert targets(generative) == [*tokenizer.encode("it was"), tokenizer.end_of_document]
    rated = encoding.discriminative(TALK, "it was", "unsafe", rating=True, max_tokens=200)
    assert rated.ids == [
        *encoding.context(TALK),
        *tokenizer.encode("it was"),
        tokenizer.symbols["UNSAFE"],
        *targets(rated),
    ]
    assert targets(rated) == tokenizer.encode("1")
    assert encoding.rating_ids == tuple(tokenizer.encode("01"))
    assert [CONTROL_SYMBOLS[encoding.attribute(name)] for name in ATTRIBUTES] == [name.upper() for name in ATTRIBUTES]


def test_a_research_step_is_routed_by_its_first_target(encoding, tokenizer):
    steps = [("all what", "were had"), ("not", "but")]
    query, answer = Message("assistant", "one", to="TS"), Message("assistant", "as be")
    given_ = ["RESPONSE", "for it", "TS", "all what", RESULT, "were had", "TS", "not", RESULT, "but"]
    for action, symbol in ((query, "TS"), (answer, "USER")):
        example = encoding.research_step(TALK[1:2], "for it", steps, action, max_tokens=200)
        parts = ["end_of_document", "USER", "the of", *given_, symbol, action.content, "end_of_document"]
        assert shown(encoding, tokenizer, example.ids) == parts
        context = encoding.research_context(TALK[1:2], "for it", steps)
        assert example.ids[: len(context)] == context
        assert example.loss_mask == [False] * len(context) + [True] * (len(example.ids) - len(context))


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, min_size=3, max_size=3))
def test_text_that_spells_out_sentinels_stays_text(encoding, tokenizer, texts):
    said, response, snippet = texts
    messages = [Message("user", said)]
    context = encoding.context(messages)
    assert [id for id in context if id in encoding.stop_ids] == [context[0], tokenizer.symbols["USER"], context[-1]]
    assert not encoding.stop_ids.intersection(encoding.text(response))
    assert encoding.decode(context) == said
    whole = encoding.research_context(messages, response, [(said, snippet)])
    names = [CONTROL_SYMBOLS[id] for id in whole if id in encoding.stop_ids]
    assert names == ["end_of_document", "USER", "RESPONSE", "TS", RESULT]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXT, min_size=2, max_size=6), room=st.integers(8, 60), data=st.data())
def test_what_is_too_long_loses_its_oldest_turns_and_fits(encoding, texts, room, data):
    messages = [Message("user" if n % 2 else "assistant", text) for n, text in enumerate(texts[:-1])]
    cut, whole = encoding.context(messages, max_tokens=room), encoding.context(messages)
    assert len(cut) <= room
    assert (cut[0], cut[-1]) == (whole[0], whole[-1])
    tail = cut[2:] if cut != whole else cut[1:]
    assert whole[len(whole) - len(tail) :] == tail
    kind = data.draw(st.sampled_from(["generative", "discriminative", "research_step"]))
    if kind == "generative":
        example = encoding.generative(messages, texts[-1], max_tokens=room)
    elif kind == "discriminative":
        example = encoding.discriminative(messages, texts[-1], "sensible", rating=True, max_tokens=room)
    else:
        query = Message("assistant", texts[-1], to="TS")
        example = encoding.research_step(messages, texts[0], [(texts[0], texts[-1])], query, max_tokens=room)
    assert len(example.ids) == len(example.loss_mask) <= room
    assert any(example.loss_mask)
    assert not example.loss_mask[0]


ROLE = st.sampled_from(["system", "user", "assistant"])


@settings(max_examples=100, deadline=None)
@given(said=st.lists(st.tuples(ROLE, TEXT), min_size=1, max_size=8), room=st.integers(4, 60))
def test_system_messages_stay_and_the_oldest_turns_leave_first(encoding, tokenizer, said, room):
    messages = [Message(role, text) for role, text in said]
    pieces = [encoding.context([message])[1:-1] for message in messages]
    context = encoding.context(messages, max_tokens=room)
    assert len(context) <= room
    needed = sum(len(p) for p, m in zip(pieces[:-1], messages, strict=False) if m.role == "system") + len(pieces[-1])
    if needed <= room - 2:
        # Whole turns only: what stays begins with a user's message, with everything, or is the last message alone.
        begins = [n for n, m in enumerate(messages) if m.role == "user" or n in (0, len(messages) - 1)]
        fits = [
            [p for n, (p, m) in enumerate(zip(pieces, messages, strict=True)) if m.role == "system" or n >= first]
            for first in begins
        ]
        best = next(kept for kept in fits if sum(map(len, kept)) <= room - 2)
        assert context == [encoding.end, *(id for piece in best for id in piece), encoding.response_symbol]
    elif room >= 8:
        names = [CONTROL_SYMBOLS[id] for id in context if id in encoding.stop_ids]
        assert names[-2] == {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT"}[messages[-1].role]
        assert set(names[1:-2]) <= {"SYSTEM"}
        assert ("SYSTEM" in names[1:-2]) == any(message.role == "system" for message in messages[:-1])


def test_a_system_message_outlives_a_long_conversation(encoding, tokenizer):
    talk = [Message("user" if n % 2 else "assistant", f"the of {n}") for n in range(13)]
    context = encoding.context([TALK[0], *talk], max_tokens=64)
    parts = shown(encoding, tokenizer, context)
    assert parts[1:3] == ["SYSTEM", "Be brief."]
    assert parts[-3:] == ["ASSISTANT", "the of 12", "RESPONSE"]
    example = encoding.generative([TALK[0], *talk], "it was", max_tokens=64)
    assert shown(encoding, tokenizer, example.ids)[1:3] == ["SYSTEM", "Be brief."]


@pytest.mark.parametrize("as_lines", [False, True])
def test_turns_leave_as_a_whole_and_are_counted(encoding, as_lines):
    talk = [TALK[0]]
    for number in range(9):
        talk += [Message("user", f"the of {number}"), Message("assistant", f"and to {number}")]
    talk.append(Message("user", "in is"))
    whole = encoding.fitted_context(talk, max_tokens=1000, as_lines=as_lines)
    assert whole.turns_left_out == 0
    assert not whole.note()
    seen = set()
    for room in range(40, len(whole.ids) + 1):
        fitted = encoding.fitted_context(talk, max_tokens=room, as_lines=as_lines)
        left = fitted.turns_left_out
        kept = encoding.fitted_context([talk[0], *talk[1 + 2 * left :]], max_tokens=1000, as_lines=as_lines)
        assert fitted.ids == kept.ids
        assert len(fitted.ids) <= room
        assert fitted.messages_left_out == 2 * left
        assert (fitted.system_cut, fitted.last_message_cut) == (False, False)
        assert (str(left) in fitted.note()) == (left > 0)
        seen.add(left)
    assert len(seen) > 4
    small = encoding.fitted_context([Message("system", "the of " * 30), *talk[1:]], max_tokens=30, as_lines=as_lines)
    assert (small.turns_left_out, small.system_cut, len(small.ids)) == (9, True, 30)


def test_research_takes_the_room_that_the_conversation_leaves(encoding, tokenizer):
    snippet = "the of and to in is was that for it " * 5
    base, query, length = "for it", "the", len(tokenizer.encode(snippet))

    def symbols(ids):
        return [CONTROL_SYMBOLS[id] for id in ids if id in encoding.stop_ids]

    for count in (1, 2, 4):
        for room in (96, 200, 400):
            ids = encoding.research_context(TALK[1:2], base, [(query, snippet)] * count, max_tokens=room)
            whole = encoding.research_context(TALK[1:2], base, [(query, snippet)] * count)
            assert symbols(ids) == symbols(whole)
            assert len(ids) == min(room, len(whole))
    long = [Message("user", snippet)] * 9
    ids = encoding.research_context(long, base, [(query, snippet)] * 4, max_tokens=200)
    begun = ids.index(encoding.response_symbol) + 1
    assert len(ids) - begun == 100
    assert begun > 100 - (length + 1)
    ids = encoding.research_context(TALK[1:2], base, [(query, f"{n} {snippet}") for n in range(20)], max_tokens=128)
    kept = symbols(ids).count("TS")
    assert 2 <= kept < 20
    assert symbols(ids) == ["end_of_document", "USER", "RESPONSE", *["TS", RESULT] * kept]
    assert len(ids) <= 128
    found = [part.split()[0] for part in shown(encoding, tokenizer, ids) if part[0].isdigit()]
    assert found == [str(n) for n in range(20 - kept, 20)]


def test_a_tokenizer_without_single_digits_is_refused(tokenizer):
    class Odd(Tokenizer):
        def encode(self, text):
            return super().encode(text) * 2

    odd = object.__new__(Odd)
    odd.__dict__.update(vars(tokenizer))
    with pytest.raises(UserError, match="'0' as 2 ids"):
        Encoding(odd)


RECORD = {
    "messages": [
        {"role": "user", "content": "How old is she?"},
        {"role": "assistant", "content": "30.", "labels": {"sensible": 1, "grounded": 0}},
        {"role": "assistant", "content": "her age", "to": "TS"},
        {"role": "tool", "content": "Age / 35"},
        {"role": "assistant", "content": "35.", "labels": {"grounded": 1}, "knowledge": ["ages.txt:3"]},
    ]
}


def test_a_record_is_read_and_written_back():
    conversation = parse_conversation(RECORD)
    assert conversation.messages[2] == Message("assistant", "her age", to="TS")
    assert dict(conversation.messages[1].labels) == {"sensible": True, "grounded": False}
    assert conversation.messages[4].knowledge == ("ages.txt:3",)
    assert to_record(conversation) == RECORD


@pytest.mark.parametrize(
    ("entry", "output"),
    [
        ("hello", "message 1: is not a JSON object"),
        ({"role": "bot", "content": "x"}, "role is 'bot', not one of system, user"),
        ({"role": "user"}, "content is not text"),
        ({"role": "user", "content": "\ud800"}, "content is not text"),
        ({"role": "user", "content": "x", "to": "TS"}, "to is 'TS'"),
        ({"role": "user", "content": "x", "label": {}}, "no key 'label'; did you mean 'labels'"),
        ({"role": "assistant", "content": "x", "labels": {"sensibel": 1}}, "did you mean 'sensible'"),
        ({"role": "assistant", "content": "x", "labels": {"unsafe": 2}}, "label unsafe is 2, not 0 or 1"),
        ({"role": "user", "content": "x", "labels": {"unsafe": 1}}, "labels rate an assistant's message"),
        ({"role": "tool", "content": "x"}, "follows no query"),
        ({"role": "user", "content": "x", "knowledge": "y"}, "knowledge is not a list of texts"),
        ({"role": "assistant", "content": None}, "content is not text"),
        ({"role": None, "content": "x"}, "role is None"),
        ({"role": "user", "content": "x", "name": "Bob"}, "no key 'name'"),
    ],
)
def test_a_bad_message_is_refused_with_its_reason(entry, output):
    with pytest.raises(ValueError, match="message 1") as refused:
        parse_conversation({"messages": [entry]})
    assert output in str(refused.value)


def test_everything_that_is_wrong_is_reported_at_once():
    with pytest.raises(ValueError, match=r"message 1: role is 'bot'.*; message 2: content is not text"):
        parse_conversation({"messages": [{"role": "bot", "content": "x"}, {"role": "user", "content": 3}]})
    for record in (None, {}, {"messages": []}, {"messages": "x"}):
        with pytest.raises(ValueError, match="no list of messages"):
            parse_conversation(record)
