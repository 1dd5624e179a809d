"""Conversations as tokens, and which of them are learnt: the assistant's words (docs/specs/data.md §3.7)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError

IGNORED = -100
"""Target of a token that is not learnt."""
ROLES = ("system", "user", "assistant", "tool")
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How a conversation is written."""

    turn: str
    """One message, with {role} and {content}."""
    answer_prefix: int
    """Tokens of an assistant's turn before its words."""
    marker: str
    """A text that begins every turn and must be one token."""
    begin: str = ""
    """Before the first turn."""


FORMATS = {
    "chatml": PromptFormat("<|im_start|>{role}\n{content}<|im_end|>\n", 3, "<|im_start|>"),
    "llama3": PromptFormat(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        4,
        "<|start_header_id|>",
        "<|begin_of_text|>",
    ),
}


def get_prompt_format(name: str, tokenizer: Tokenizer) -> PromptFormat:
    """The format of a name; an `MtError` if the tokenizer does not know its special tokens."""
    prompt = FORMATS[name]
    if len(tokenizer.encode(prompt.marker)) != 1:
        raise MtError(
            "data.prompt_format", f"{name!r} needs {prompt.marker}, which the tokenizer has not", "another one"
        )
    return prompt


def split_conversations(messages: Sequence[Message], where: str) -> list[list[Message]]:
    """Messages of one line, cut before each system message; wrong ones are an `MtError`."""
    conversations: list[list[Message]] = []
    for number, message in enumerate(messages, start=1):
        role, content = str(message.get("role", "")).lower(), message.get("content")
        if role not in ROLES:
            raise MtError(where, f"message {number} has role {message.get('role')!r}", f"allowed: {', '.join(ROLES)}")
        if not isinstance(content, str) or (not content and role != "system"):
            raise MtError(where, f"message {number} has no content", "a text")
        if role == "system" or not conversations:
            conversations.append([])
        if role == "assistant" and (not conversations[-1] or conversations[-1][-1]["role"] not in ("user", "tool")):
            raise MtError(where, f"message {number} is an answer to nothing", "an assistant after a user or tool")
        conversations[-1].append({"role": role, "content": content})
    return conversations


def encode_conversation(
    conversation: Sequence[Message], tokenizer: Tokenizer, prompt: PromptFormat
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and targets: the token where it is learnt, else −100."""
    tokens = tokenizer.encode(prompt.begin) if prompt.begin else []
    targets = [IGNORED] * len(tokens)
    for message in conversation:
        turn = tokenizer.encode(prompt.turn.format_map(message))
        ignored = prompt.answer_prefix if message["role"] == "assistant" else len(turn)
        tokens += turn
        targets += [IGNORED] * ignored + turn[ignored:]
    return tokens, targets
