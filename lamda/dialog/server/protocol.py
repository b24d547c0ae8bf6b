"""Requests in OpenAI's format. Unsupported parameters are rejected by name; none is ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from lamda.dialog.conversation import Message
from lamda.dialog.server.limits import KEYS, PARTS, PROBLEMS, STOPS, STRUCTURE
from lamda.inference.sampling import PENALTIES, TEMPERATURES

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0, 0.0), "function_call": ("none",),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "metadata": ({},), "modalities": (["text"],),
    "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0, 0.0), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "service_tier": ("auto", "default"), "store": (False,), "suffix": ("",),
    "tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""OpenAI's unsupported parameters, and the values of each that have no effect, like null."""

_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],), "audio": (), "function_call": (), "refusal": (), "tool_calls": ([],),
}  # fmt: skip
"""The same inside a message: the official client sends them back with an answer."""


class RequestError(Exception):
    """A request answered with an error: HTTP status, message, the parameter at fault and OpenAI's code."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or {401: "invalid_api_key", 429: "rate_limit_exceeded"}.get(status)

    def to_record(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shortened(text: str) -> str:
    """A client's text for an error message: quoted and truncated."""
    return repr(text if len(text) <= 100 else text[:100] + "...")


def _at_most(most: int) -> BeforeValidator:
    """Reject a longer list before its elements are validated."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > most:
            raise ValueError(f"has {len(value):,} elements: at most {most:,}")
        return value

    return BeforeValidator(check)


# The first wrong element ends the search (FailFast): the work is not proportional to what is wrong.
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], FailFast(), _at_most(STOPS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Tolerant(_Strict):
    """Null, and the `neutral` values of unsupported parameters, mean the default."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """The values that have an effect. 0 is not False: `logprobs: 0` has one. Raises ValueError."""
        if not isinstance(values, dict):
            return values
        if len(values) > KEYS:
            raise ValueError(f"has {len(values):,} keys: at most {KEYS}")

        def asks(name: str, value: object) -> bool:
            return not any(type(value) is type(none) and value == none for none in (None, *cls.neutral.get(name, ())))

        return {name: value for name, value in values.items() if asks(name, value)}


class StreamOptions(_Strict):
    """Options of a stream; `include_obfuscation` requests padding, which is not supported.

    include_progress: events that say how far a chat's candidates are, while no text may be sent.
    """

    include_usage: bool = False
    include_progress: bool = False
    include_obfuscation: Literal[False] = False


class _GenerationRequest(_Tolerant):
    """The common parameters; those that name the end user or a cache have no effect."""

    neutral = _NEUTRAL
    model: str
    max_tokens: int | None = Field(None, ge=1, lt=2**63)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(40, ge=0, lt=2**63)
    repetition_penalty: float = Field(1.0, ge=PENALTIES[0], le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stops = Field(default_factory=list)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("temperature")
    @classmethod
    def _not_denormal(cls, value: float) -> float:
        if 0 < value < TEMPERATURES[0]:
            raise ValueError(f"give 0 (likeliest), or at least {TEMPERATURES[0]:g}")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, value: StreamOptions | None, info: Any) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only with stream: true")
        return value


RequestT = TypeVar("RequestT", bound=_GenerationRequest)


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """The prompts, from OpenAI's four forms. Raises ValueError, with one message rather than one per form."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(each, str) for each in value):
            return value
        lists = value if isinstance(value[0], list) else [value]
        if all(isinstance(ids, list) and all(type(id) is int for id in ids) for ids in lists):
            return lists
    raise ValueError("give a text, a list of texts, a list of ids or a list of lists of ids, not empty")


class CompletionRequest(_GenerationRequest):
    """`POST /v1/completions`: continue texts or ids; choice `p * n + c` continues prompt p."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    logprobs: int | None = Field(None, ge=0, le=5)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Tolerant):
    """A message; tools are the server's own, so no client can send their messages. `name` has no effect."""

    neutral = _NEUTRAL_IN_MESSAGE
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], FailFast(), _at_most(PARTS)]
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        if not isinstance(value, (str, list)):
            raise ValueError("give a text, or a list of text parts")
        return [{"type": "text", "text": value}] if isinstance(value, str) else value

    def to_message(self) -> Message:
        """As a message of `lamda.dialog.conversation`."""
        role = "system" if self.role == "developer" else self.role
        return Message(role, "".join(part.text for part in self.content))


class ChatRequest(_GenerationRequest):
    """`POST /v1/chat/completions`: answer the last message."""

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**63)
    candidates: int | None = Field(None, ge=1, lt=2**63)
    threshold: float | None = Field(None, ge=0, le=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: int, info: Any) -> int:
        if value and not info.data.get("logprobs"):
            raise ValueError("only with logprobs: true")
        return value

    @field_validator("stop")
    @classmethod
    def _no_stops(cls, stops: list[str]) -> list[str]:
        if stops:
            raise ValueError("not supported here: an answer ends where the model ends it")
        return stops


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """A request from its JSON. Raises RequestError that lists the first `PROBLEMS` problems."""
    if (structure := sum(map(body.count, (b",", b"[", b"{")))) > STRUCTURE:
        raise RequestError(400, f"the body has {structure:,} commas and opening brackets: at most {STRUCTURE:,}")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    problems = [(".".join(str(part)[:100] for part in each["loc"]), each) for each in found[:PROBLEMS]]
    lines = [f"{place or 'the body'}: {_problem(place, each)}" for place, each in problems]
    if len(found) > PROBLEMS:
        lines.append(f"and {len(found) - PROBLEMS:,} more")
    raise RequestError(400, "; ".join(lines), param=problems[0][0] or None)


def _problem(name: str, problem: Any) -> str:
    if problem["type"] != "extra_forbidden":
        return str(problem["msg"]).removeprefix("Value error, ")[:500]
    is_openais = name in _NEUTRAL or name.rpartition(".")[2] in _NEUTRAL_IN_MESSAGE
    return "is not supported" if is_openais else "is not a parameter of this server"
