"""`POST /v1/chat/completions`: a conversation, written by the tokenizer's chat template and answered.

Tools go to the template as they are; an answer that calls one is text, as the model wrote it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mt_eval.generation.choices import Choice, Delta, Prompt, TokenEntry, count_usage
from mt_eval.generation.requests import Request
from mt_eval.serving.interfaces.bodies import MAX_LOG_PROBS, ApiError, OpenAIBody
from mt_eval.serving.interfaces.calls import ServedModel, make_header, make_request

RESERVED = ("messages", "tools", "add_generation_prompt")
"""Variables of a template that the request itself gives."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Part):
    """A part of a message; other kinds than text, such as images, are refused."""

    type: Literal["text"]
    text: str


class Message(_Part):
    """One turn; a template sees all its fields."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def values(self) -> dict[str, Any]:
        """The fields for a template: parts of a text joined by line feeds, arguments of calls as objects."""
        fields = self.model_dump(exclude_none=True)
        if not isinstance(self.content, str):
            fields["content"] = "\n".join(part.text for part in self.content or ())
        for call in fields.get("tool_calls", ()):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = json.loads(function["arguments"] or "{}")
        return fields


class ResponseFormat(_Part):
    """The form of the answer: a text."""

    type: Literal["text"]


class ChatBody(OpenAIBody):
    """The fields of a chat completion."""

    harmless = OpenAIBody.harmless | {"parallel_tool_calls"}
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOG_PROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    response_format: ResponseFormat | None = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_one(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") not in (None, value):
            raise ValueError("differs from max_tokens: give one of the two")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _check_log_probs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError('only with "logprobs": true')
        return value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_reserved(cls, value: dict[str, Any]) -> dict[str, Any]:
        if names := [name for name in RESERVED if name in value]:
            raise ValueError(f"{', '.join(names)} cannot be set here: the request gives it")
        return value


@dataclass
class Chat:
    """A chat completion, as a `Call`."""

    body: ChatBody
    model: str
    requests: Sequence[Request]
    choices: Sequence[Choice]
    header: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        kind = "chat.completion.chunk" if self.body.stream else "chat.completion"
        self.header = make_header(kind, "chatcmpl", self.model)
        self._begun = False

    @property
    def stream(self) -> bool:
        """Whether the answer is sent as it grows."""
        return self.body.stream

    def respond(self) -> dict[str, Any]:
        """The whole answer."""
        (choice,) = self.choices
        message = {"role": "assistant", "content": choice.text}
        log_probs = self._write_log_probs(choice.entries)
        written = {"index": 0, "message": message, "logprobs": log_probs, "finish_reason": choice.finish}
        return {**self.header, "choices": [written], "usage": count_usage(self.requests, self.choices)}

    def write_chunks(self, index: int, delta: Delta) -> Sequence[dict[str, Any]]:
        """The events of one output: the role before the first text, the end after the last."""
        chunks = []
        if not self._begun:
            chunks.append(self._write_chunk({"role": "assistant", "content": ""}))
            self._begun = True
        if delta.text or delta.entries:
            chunks.append(self._write_chunk({"content": delta.text}, delta.entries))
        if delta.finish:
            chunks.append(self._write_chunk({}, finish=delta.finish))
        return chunks

    def write_last_chunks(self) -> Sequence[dict[str, Any]]:
        """The usage, if it is asked for."""
        if self.body.stream_options is None or not self.body.stream_options.include_usage:
            return ()
        return ({**self.header, "choices": [], "usage": count_usage(self.requests, self.choices)},)

    def _write_chunk(
        self, delta: dict[str, str], entries: Sequence[TokenEntry] = (), finish: str | None = None
    ) -> dict[str, Any]:
        log_probs = self._write_log_probs(entries) if entries else None
        choice = {"index": 0, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
        return {**self.header, "choices": [choice]}

    def _write_log_probs(self, entries: Sequence[TokenEntry]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": [entry.document() for entry in entries], "refusal": None}


def parse_chat(body: dict[str, Any], served: ServedModel) -> Chat:
    """The call that a body asks for; an `ApiError` for what cannot be done."""
    asked = ChatBody.parse(body)
    served.check_name(asked.model)
    prompt = Prompt(tuple(served.encoder.encode_plain(_render(asked, served))))
    new = served.check_length(prompt, asked.max_completion_tokens or asked.max_tokens, "messages")
    log_probs = (asked.top_logprobs or 0) if asked.logprobs else None
    request = make_request(served, asked, prompt, new=new, log_probs=log_probs)
    choice = Choice(served.encoder.tokenizer, prompt, asked.stop, spell=asked.logprobs)
    return Chat(asked, served.name, [request], [choice])


def _render(asked: ChatBody, served: ServedModel) -> str:
    """The text that the model continues."""
    if served.template is None:
        message = "messages: the tokenizer of this model has no chat template"
        hint = "start `mt serve` with --chat-template FILE, or send a prompt to /v1/completions"
        raise ApiError(f"{message}; {hint}", param="messages")
    try:
        messages = [message.values() for message in asked.messages]
    except ValueError as err:
        raise ApiError(f"messages: arguments of a tool call are no JSON ({err})", param="messages") from None
    tools = None if asked.tool_choice == "none" else asked.tools
    values = {**asked.chat_template_kwargs, "messages": messages, "tools": tools}
    return served.template.render_prompt(values, "messages")
