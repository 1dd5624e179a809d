"""Chat templates: the Jinja text beside a tokenizer that writes a conversation as the model is to read it.

A template that marks with `{% generation %}` what the model writes itself is taken at its word. With any other, an
answer is what the template adds to the conversation before it, whose text ends with the header of the answer
(`add_generation_prompt`). Some templates rewrite earlier answers as a conversation goes on: there an answer is not one
stretch of the text, and such conversations are refused.

Templates are programs of strangers and run in Jinja's sandbox. None can ask for the date: a run that is resumed on
another day must see the same text.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_data.config import SFTData
from mt_data.datasets.sft.prompt import Message, RenderedConversation
from mt_data.tokenizers.hugging_face import read_named_tokens, read_object

if TYPE_CHECKING:
    from jinja2 import Template

WHERE = "data.prompt_format"
FILE = "chat_template.jinja"
KEY, NAME = "chat_template", "default"
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
BEGIN, END = (f"\ue000{secrets.token_hex(16)}{side}\ue001" for side in "<>")
"""Around a generation block in the rendered text, and in no message: they are drawn anew in every process."""
HINT = "{% generation %} blocks in the template say what is learnt; or conversations with one answer each"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and the texts of the special tokens that it may use."""

    source: str
    where: str
    """The file that it is from."""
    tokens: Mapping[str, str]
    """`bos_token`, `eos_token` and whatever else is named."""

    def render(self, conversation: Sequence[Message], where: str) -> RenderedConversation:
        """The text of a conversation and the answers in it; an `MtError` if the template cannot say where they are."""
        whole = self._write({"messages": list(conversation)}, where)
        if GENERATION.search(self.source):
            return _read_marks(whole)
        answers = []
        for number, message in enumerate(conversation):
            if message["role"] == "assistant":
                earlier = list(conversation[:number])
                before = self._write({"messages": earlier, "add_generation_prompt": True}, where)
                after = self._write({"messages": [*earlier, message]}, where)
                if not (after.startswith(before) and whole.startswith(after)):
                    actual = f"{self.where} writes answer {len(answers) + 1} otherwise once there is more"
                    raise MtError(where, actual, HINT)
                answers.append((len(before), len(after)))
        return RenderedConversation(whole, tuple(answers))

    def render_prompt(self, values: Mapping[str, object], where: str) -> str:
        """The text up to the answer that is to be written; `values` are `messages` and what else the template reads."""
        return _read_marks(self._write({"add_generation_prompt": True, **values}, where)).text

    def _write(self, values: Mapping[str, object], where: str) -> str:
        template = _compile(self.source, self.where)
        defaults = {"tools": None, "documents": None, "add_generation_prompt": False}
        try:
            return template.render({**defaults, **self.tokens, **values})
        except Exception as err:  # whatever a stranger's program may raise
            message = " ".join(str(err).split()) or type(err).__name__
            raise MtError(where, f"{self.where} cannot write it: {message}", "a conversation of its form") from err


def read_chat_template(config: SFTData) -> ChatTemplate:
    """The template of `data.chat_template`, else that of the tokenizer's directory; an `MtError` if there is none."""
    assert config.tokenizer is not None, "data_problems asks for one"
    model = Path(config.tokenizer.model or ".")
    directory = model if model.is_dir() else model.parent
    template = find_chat_template(directory, Path(config.chat_template) if config.chat_template else None)
    if template is None:
        actual = f'is "template", but {directory} has neither {FILE} nor a {KEY} in tokenizer_config.json'
        raise MtError(WHERE, actual, "name a file in data.chat_template, or take another format")
    return template


def find_chat_template(directory: Path, path: Path | None = None) -> ChatTemplate | None:
    """The template in the file `path`, else that of a tokenizer's directory; None if there is none."""
    sourced = _read_source(directory, path)
    if sourced is None:
        return None
    source, where = sourced
    _compile(source, where)  # a mistake shows before any work
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in read_named_tokens(directory).items()
    }
    return ChatTemplate(source, where, {name: text for name, text in texts.items() if isinstance(text, str)})


def _read_source(directory: Path, path: Path | None) -> tuple[str, str] | None:
    """The text of a template and the file that it is from."""
    if path or (directory / FILE).is_file():
        path = path or directory / FILE
        try:
            return path.read_text("utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as err:
            raise MtError(str(path), f"cannot be read ({err})", "a text file with a Jinja template") from err
    path = directory / "tokenizer_config.json"
    template = read_object(path).get(KEY)
    if isinstance(template, list):  # several, each with a name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get(NAME)
    return (template, str(path)) if isinstance(template, str) else None


@cache
def _compile(source: str, where: str) -> "Template":
    jinja = import_library("jinja2", where=WHERE, requires=["mt-data[chat]"])
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _write_json
    environment.globals |= {"raise_exception": _refuse, "mark_generation": _mark}
    marked = GENERATION.sub(
        lambda tag: f"{{%{tag[1]} {'endcall' if tag[2] else 'call mark_generation()'} {tag[3]}%}}", source
    )
    try:
        return environment.from_string(marked)
    except jinja.TemplateError as err:
        raise MtError(where, f"is not a Jinja template: {err}", "a chat template") from err


def _mark(caller: "Template") -> str:
    return f"{BEGIN}{caller()}{END}"  # pyright: ignore[reportCallIssue]


def _refuse(message: str) -> None:
    raise ValueError(message)


def _write_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _read_marks(marked: str) -> RenderedConversation:
    """Take the marks out of a text, and say where they were."""
    text, answers = "", []
    for number, part in enumerate(re.split(f"{BEGIN}|{END}", marked)):
        if number % 2:
            answers.append((len(text), len(text) + len(part)))
        text += part
    return RenderedConversation(text, tuple(answers))
