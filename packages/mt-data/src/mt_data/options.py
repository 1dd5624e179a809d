"""Options that several commands of `mt data` share, and how they print; only `mt` imports this module."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from mt_core.errors import MtError
from mt_core.plugins import components
from mt_data.config import TokenizerConfig


class MultiValueCommand(TyperCommand):
    """A command whose list options take several values at once, as Megatron's do: `--input a.jsonl b.jsonl`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each further value; the command has no arguments that a value could be."""
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        repeated: list[str] = []
        option = ""
        for position, arg in enumerate(args):
            if arg.startswith("-"):
                option = arg if arg in lists else ""
            elif option and args[position - 1] != option:
                repeated.append(option)
            repeated.append(arg)
        return super().parse_args(ctx, repeated)


def _tokenizer_names() -> list[str]:
    return list(components("tokenizer"))


TOKENIZER_OPTIONS = {
    "tokenizer_type": Annotated[
        str | None,
        typer.Option(help="Kind of tokenizer; found from the files if not given.", autocompletion=_tokenizer_names),
    ],
    "vocab_file": Annotated[
        Path | None, typer.Option(help="vocab.json of GPT2BPETokenizer, vocab.txt of the BertWordPiece types.")
    ],
    "merge_file": Annotated[Path | None, typer.Option(help="merges.txt of GPT2BPETokenizer.")],
    "tokenizer_model": Annotated[
        Path | None, typer.Option(help="A tokenizer.json, a directory with a tokenizer in it, a .model or Tik's .json.")
    ],
    "vocab_size": Annotated[int | None, typer.Option(min=1, help="Ids of NullTokenizer (one more) or TikTokenizer.")],
    "vocab_extra_ids": Annotated[
        int | None, typer.Option(min=0, help="Number of <extra_id_…> of BertWordPiece and SentencePieceTokenizer.")
    ],
    "tiktoken_pattern": Annotated[
        Literal["v1", "v2"] | None, typer.Option(help="How TikTokenizer splits text; v2 if not given.")
    ],
    "tiktoken_num_special_tokens": Annotated[
        int | None, typer.Option(min=1, help="Ids before TikTokenizer's first byte; 1000 if not given.")
    ],
    "tiktoken_special_tokens": Annotated[list[str] | None, typer.Option(help="Names of TikTokenizer's first ids.")],
}
"""Megatron's names, and what each is for. All are None if they are not given."""


def with_tokenizer_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with Megatron's options in place of its parameter `tokenizer: TokenizerConfig | None`.

    That is None if none of them is given. An option that the command has a parameter of its own for stays its own.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[name]) for name, p in inspect.signature(command).parameters.items()]
    options = {name: hint for name, hint in TOKENIZER_OPTIONS.items() if name not in hints}
    parameters = []
    for parameter in own:
        if parameter.name == "tokenizer":
            added = (
                Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=hint) for name, hint in options.items()
            )
            parameters += added
        else:
            parameters.append(parameter.replace(kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        taken = {name: values.pop(name) for name in options}
        given = {name: value for name, value in taken.items() if value is not None and value != []}
        command(**values, tokenizer=make_tokenizer_config(given) if given else None)

    with_options.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def make_tokenizer_config(given: Mapping[str, Any]) -> TokenizerConfig:
    """The configuration that the options describe; without a type, the one that the files are of."""
    fields: dict[str, Any] = {name.removeprefix("tokenizer_"): value for name, value in given.items()}
    fields |= {name: str(value) for name, value in fields.items() if isinstance(value, Path)}
    model = given.get("tokenizer_model")
    if model is None or "type" in fields:
        return TokenizerConfig(**fields)
    if model.is_dir():
        from mt_data.tokenizers.build import detect_tokenizer

        del fields["model"]
        return TokenizerConfig(**detect_tokenizer(model).model_dump(exclude_defaults=True) | fields)
    if model.suffix == ".model":
        kinds = "SentencePieceTokenizer, GPTSentencePieceTokenizer or Llama2Tokenizer"
        raise MtError("--tokenizer-type", f"not given, and {model} fits several", kinds)
    fields["type"] = "HuggingFaceTokenizer"
    return TokenizerConfig(**fields)


def print_rows(rows: dict[str, str]) -> None:
    """A table of two columns on stdout."""
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """A table on stdout; all but the first `left` columns hold numbers and are set to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [f"{c:<{w}}" if n < left else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())
