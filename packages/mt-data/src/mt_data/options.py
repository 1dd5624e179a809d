"""Options that several commands of `mt data` share, and how they print; only `mt` imports this module."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mt_core.cli.completion import names
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig


@dataclass(frozen=True, slots=True)
class TokenizerOptions:
    """A tokenizer by Megatron's options; all are None if they are not given."""

    tokenizer_type: Annotated[
        str | None,
        typer.Option(help="Kind of tokenizer; found from the files if not given.", autocompletion=names("tokenizer")),
    ] = None
    vocab_file: Annotated[Path | None, "vocab.json of GPT2BPETokenizer, vocab.txt of the BertWordPiece types."] = None
    merge_file: Annotated[Path | None, "merges.txt of GPT2BPETokenizer."] = None
    tokenizer_model: Annotated[
        Path | None, "A tokenizer.json, a directory with a tokenizer in it, a .model or Tik's .json."
    ] = None
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Ids of NullTokenizer (one more) or TikTokenizer.")] = (
        None
    )
    vocab_extra_ids: Annotated[
        int | None, typer.Option(min=0, help="Number of <extra_id_…> of BertWordPiece and SentencePieceTokenizer.")
    ] = None
    tiktoken_pattern: Annotated[Literal["v1", "v2"] | None, "How TikTokenizer splits text; v2 if not given."] = None
    tiktoken_num_special_tokens: Annotated[
        int | None, typer.Option(min=1, help="Ids before TikTokenizer's first byte; 1000 if not given.")
    ] = None
    tiktoken_special_tokens: Annotated[list[str] | None, "Names of TikTokenizer's first ids."] = None

    def config(self) -> TokenizerConfig | None:
        """The tokenizer that the options name; None if none of them is given."""
        given = {name: value for name, value in asdict(self).items() if value is not None and value != []}
        return make_tokenizer_config(given) if given else None


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
