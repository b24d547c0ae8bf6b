"""Log probabilities of tokens in OpenAI's two forms. A token that is no whole text is named by its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from lamda.data.tokenizer import RESERVED_PIECES, Tokenizer
from lamda.inference.generation import TokenScore


def chat_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore] | None) -> dict[str, Any] | None:
    """The field `logprobs` of a chat's choice; None if the request did not ask for it."""
    if scores is None:
        return None

    def entry(id: int, log_probability: float) -> dict[str, Any]:
        utf8 = tokenizer.utf8(id)
        return {"token": _name(tokenizer, id), "logprob": log_probability, "bytes": list(utf8)}

    content = [
        {**entry(each.id, each.log_probability), "top_logprobs": [entry(*likely) for likely in each.likeliest]}
        for each in scores
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore] | None) -> dict[str, Any] | None:
    """The same of a completion's choice. text_offset: in characters from the beginning of the choice."""
    if scores is None:
        return None
    utf8 = b"".join(tokenizer.utf8(each.id) for each in scores)
    places = accumulate((len(tokenizer.utf8(each.id)) for each in scores[:-1]), initial=0)
    return {
        "tokens": [_name(tokenizer, each.id) for each in scores],
        "token_logprobs": [each.log_probability for each in scores],
        "top_logprobs": [{_name(tokenizer, id): value for id, value in each.likeliest} for each in scores],
        "text_offset": [len(utf8[:place].decode(errors="replace")) for _, place in zip(scores, places, strict=False)],
    }


def _name(tokenizer: Tokenizer, id: int) -> str:
    utf8 = tokenizer.utf8(id)
    if not utf8:
        return RESERVED_PIECES[id]
    try:
        return utf8.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in utf8)
