"""What clients may ask, in OpenAI's form. What is not supported is refused by name; nothing is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lamda.dialog.conversation import Message

Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=4)]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none",),
}
"""Parameters that are not supported, and the values that ask for nothing."""


class Refused(Exception):  # noqa: N818 - an answer, not a defect
    """A request that is answered with an error: HTTP status, message and the parameter at fault."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param

    def to_record(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": None}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False


class _Asked(_Strict):
    """What both kinds of requests share; `user` names the end user and changes nothing."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(40, ge=0)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stops = Field(default_factory=list)
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Null is OpenAI's word for the default, and so are values that ask for nothing."""
        if not isinstance(values, dict):
            return values
        return {
            name: value for name, value in values.items() if value is not None and value not in _NEUTRAL.get(name, ())
        }

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


Asked = TypeVar("Asked", bound=_Asked)


class CompletionRequest(_Asked):
    """`POST /v1/completions`: continue a text."""

    prompt: str


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """A message; tools are the server's own, so that no client can speak for them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: None = None
    refusal: None = None

    def to_message(self) -> Message:
        """As the dialogue model knows it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class ChatRequest(_Asked):
    """`POST /v1/chat/completions`: answer the last message."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    candidates: int | None = Field(None, ge=1)
    threshold: float | None = Field(None, ge=0, le=1)

    @field_validator("n")
    @classmethod
    def _one(cls, n: int) -> int:
        if n != 1:
            raise ValueError("a chat has one answer; all candidates are in the field `lamda`")
        return n

    @field_validator("stop")
    @classmethod
    def _no_stops(cls, stops: list[str]) -> list[str]:
        if stops:
            raise ValueError("not supported here: an answer ends where the model ends it")
        return stops


def parse(kind: type[Asked], body: bytes) -> Asked:
    """A request from its JSON. Raises Refused that names everything that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = [(".".join(map(str, each["loc"])), each) for each in error.errors()]
    lines = [f"{place or 'the body'}: {_told(place, each)}" for place, each in problems]
    raise Refused(400, "; ".join(lines), param=problems[0][0] or None)


def _told(name: str, problem: Any) -> str:
    if problem["type"] != "extra_forbidden":
        return str(problem["msg"]).removeprefix("Value error, ")
    return "is not supported" if name in _NEUTRAL else "is not a parameter of this server"
