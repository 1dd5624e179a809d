"""Conversations as text, and which stretches of it are learnt: the assistant's words (docs/specs/data.md §3.7).

The text of a conversation is tokenized once, as a whole. What is learnt is known as characters of it, so it depends
neither on how a header happens to be tokenized nor on which ids stand for padding or the end of a turn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]
Span = tuple[int, int]
"""Characters [begin, end) of a text."""


@dataclass(frozen=True, slots=True)
class RenderedConversation:
    """The text that a model reads of a conversation."""

    text: str
    answers: tuple[Span, ...]
    """What the model writes itself, in order."""


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """A conversation as a model reads it; both lists have the length of its tokens."""

    tokens: list[int]
    learnt: list[bool]
    """Whether the model has to predict the token."""


class ConversationRenderer(Protocol):
    """Writes conversations as text."""

    def render(self, conversation: Sequence[Message], where: str) -> RenderedConversation:
        """The text of a conversation; an `MtError` at `where` if it cannot be written."""
        ...


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """A conversation that is written turn by turn, each alike; an answer is its turn without the header."""

    header: str
    """Before a message, with {role}."""
    end: str
    """After it."""
    marker: str
    """A text that begins every turn and must be one token."""
    begin: str = ""
    """Before the first turn."""

    def render(self, conversation: Sequence[Message], where: str) -> RenderedConversation:
        """The turns one after the other."""
        del where
        text, answers = self.begin, []
        for message in conversation:
            text += self.header.format(role=message["role"])
            start = len(text)
            text += message["content"] + self.end
            answers += [(start, len(text))] if message["role"] == "assistant" else []
        return RenderedConversation(text, tuple(answers))


FORMATS = {
    "chatml": PromptFormat("<|im_start|>{role}\n", "<|im_end|>\n", "<|im_start|>"),
    "llama3": PromptFormat(
        "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>"
    ),
}


def get_prompt_format(name: str, tokenizer: Tokenizer) -> PromptFormat:
    """The format of a name; an `MtError` if the tokenizer does not know its special tokens."""
    prompt = FORMATS[name]
    if len(tokenizer.encode(prompt.marker)) != 1:
        raise MtError(
            "data.prompt_format",
            f"{name!r} needs {prompt.marker}, which the tokenizer has not",
            'another one, or "template" for the chat template of the tokenizer\'s directory',
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


OffsetEncoder = Callable[[str], tuple[list[int], list[Span]]]
"""Token ids of a text, and which of its characters each stands for."""


def get_offset_encoder(tokenizer: Tokenizer) -> OffsetEncoder:
    """The tokenizer's `encode_with_offsets`; an `MtError` if it has none."""
    encoder: OffsetEncoder | None = getattr(tokenizer, "encode_with_offsets", None)
    if encoder is None:
        name = getattr(tokenizer, "type", type(tokenizer).__name__)
        actual = f"{name} does not say where its tokens stand in a text, so answers cannot be told from prompts"
        raise MtError(
            "data.tokenizer.type",
            actual,
            "HuggingFaceTokenizer with the model's tokenizer.json, a SentencePiece type, or TikTokenizer",
        )
    return encoder


def encode_conversation(rendered: RenderedConversation, encode_with_offsets: OffsetEncoder) -> EncodedConversation:
    """Tokens of the whole text; one is learnt if any of its characters is the model's own.

    A token that reaches from the header into the answer has to be predicted to write the answer, so it is learnt.
    """
    tokens, offsets = encode_with_offsets(rendered.text)
    learnt, previous_end, answer = [], 0, 0
    for begin, end in offsets:
        if begin == end:  # white space alone, which byte-level tokenizers leave out of their offsets
            begin = min(begin, previous_end)
        while answer < len(rendered.answers) and rendered.answers[answer][1] <= begin:
            answer += 1
        learnt.append(answer < len(rendered.answers) and end > rendered.answers[answer][0])
        previous_end = end
    return EncodedConversation(tokens, learnt)
