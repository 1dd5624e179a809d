"""Bodies of requests: read and checked before anything is computed, and the errors that answer wrong ones.

Errors have the form of OpenAI's interface, which its clients show: a message, a type, and the field that is wrong.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from mt_core.config.loading import value_problem
from mt_core.errors import Problem
from mt_core.plugins import did_you_mean
from mt_data.text_io.json_documents import BadLine, find_surrogate, parse_object
from mt_eval.generation.sampling import SamplingOptions

MAX_STOPS = 16
"""Most stop strings of a request."""
MAX_LOG_PROBS = 20
"""Most alternatives to a token that an answer lists."""


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, message: str, *, status: int = 400, kind: str = "invalid_request_error", code: str = "", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param

    def document(self) -> dict[str, Any]:
        """The JSON object of an error."""
        fields = {"type": self.kind, "param": self.param or None, "code": self.code or None}
        return {"error": {"message": str(self), **fields}}

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> Self:
        """One error for everything that is wrong with a body."""
        return cls("\n".join(map(str, problems)), param=problems[0].where)


def parse_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body; `ApiError` for anything else, half surrogate pairs and NaN included."""
    try:
        body = parse_object(raw)
    except BadLine as err:
        raise ApiError(f"the body {err}; send a JSON object in UTF-8") from None
    if (text := find_surrogate(body)) is not None:
        place = next(number for number, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
        raise ApiError(
            f"the body holds half a surrogate pair, at character {place + 1} of a text; send whole characters"
        )
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        raise ApiError("the body holds NaN or Infinity, which are no JSON; send finite numbers") from None
    return body


class Body(BaseModel):
    """The fields of a request; types are never converted, unknown fields are refused by name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    harmless: ClassVar[frozenset[str]] = frozenset()
    """Fields of clients that change no token of an answer; they are left out without a word."""

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """The request, or an `ApiError` naming every field that is wrong. Null is as good as a field left out."""
        given = {name: v for name, v in body.items() if name not in cls.harmless}
        given = {name: v for name, v in given.items() if v is not None or name not in cls.model_fields}
        try:
            return cls.model_validate(given)
        except ValidationError as err:
            errors = err.errors()
        unknown = [str(error["loc"][-1]) for error in errors if error["type"] == "extra_forbidden"]
        problems = [cls._describe(dict(error)) for error in errors if error["type"] != "extra_forbidden"]
        for name in unknown:
            problems.append(Problem(name, "unknown field", did_you_mean(name, cls.model_fields)))
        raise ApiError.from_problems(problems)

    @staticmethod
    def _describe(error: dict[str, Any]) -> Problem:
        where = ".".join(map(str, error["loc"]))
        if not where:  # of several fields together, which the message names
            return Problem(*error["msg"].removeprefix("Value error, ").split(": ", 1))
        return Problem(where, "missing", "required") if error["type"] == "missing" else value_problem(where, error)


def _list_stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("a text, or a list of texts")
    if not all(stops) or len(stops) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} texts, none empty")
    return stops


def _check_single(value: object) -> object:
    if value != 1 or type(value) is not int:
        raise ValueError("only 1 is served: each answer is a request of its own; send several, with other seeds")
    return value


def _check_unset(value: object) -> object:
    if value:
        raise ValueError("is not served: leave it out, or 0 or empty")
    return value


Single = Annotated[int, BeforeValidator(_check_single)]
"""A count of answers, of which there is one."""
Unset = Annotated[Any, BeforeValidator(_check_unset)]
"""A field of OpenAI's interface that would change the answer and is not served; its neutral values are accepted."""


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool = False


class OpenAIBody(Body):
    """Fields that both of OpenAI's interfaces have; `top_k` and `ignore_eos` are those of vLLM and Megatron-LM."""

    harmless = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )
    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: Annotated[list[str], BeforeValidator(_list_stops)] = Field(default_factory=list)
    seed: int | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    n: Single = 1
    presence_penalty: Unset = 0
    frequency_penalty: Unset = 0
    logit_bias: Unset = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError('only with "stream": true')
        return value

    @field_validator("top_k")
    @classmethod
    def _check_filters(cls, value: int, info: ValidationInfo) -> int:
        if value > 1 and info.data.get("top_p", 1) < 1:
            raise ValueError("not together with a top_p below 1: give one of the two")
        return value

    def sampling(self) -> SamplingOptions:
        """How tokens are drawn; a temperature of 0 takes the likeliest."""
        if self.temperature == 0 or self.top_k == 1:
            return SamplingOptions(top_k=1)
        return SamplingOptions(self.temperature, self.top_k, self.top_p if self.top_p < 1 else 0.0)
