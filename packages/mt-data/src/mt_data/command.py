"""`mt data`: preprocess, train-tokenizer, inspect. Only `mt` imports this; heavy imports stand where they are used."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from mt_core.plugins import components
from mt_data.config import TokenizerConfig

if TYPE_CHECKING:
    from mt_data.preprocess.run import Job, Report

BYTES_WORTH_A_WORKER = 4 << 20

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Prepare and inspect training data.",
)


class ManyValues(TyperCommand):
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


TokenizerType = Annotated[
    str | None,
    typer.Option(help="Kind of tokenizer; found from the files if not given.", autocompletion=_tokenizer_names),
]
VocabFile = Annotated[Path | None, typer.Option(help="vocab.json of GPT2BPETokenizer.")]
MergeFile = Annotated[Path | None, typer.Option(help="merges.txt of GPT2BPETokenizer.")]
TokenizerModel = Annotated[Path | None, typer.Option(help="A tokenizer.json, or a directory with a tokenizer in it.")]
Inputs = Annotated[list[Path], typer.Option("--input", help="One or more files; .gz and .zst are read as they are.")]


def default_workers(inputs: list[Path]) -> int:
    """A process for every few megabytes, as starting one takes as long as tokenizing that; no more than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(path.stat().st_size for path in inputs if path.is_file())
    return max(1, min(cores, size // BYTES_WORTH_A_WORKER))


@app.command("preprocess", cls=ManyValues)
def preprocess_command(
    input: Inputs,
    output_prefix: Annotated[str, typer.Option(help="Output is PREFIX_KEY_document.bin and .idx.")],
    json_keys: Annotated[list[str], typer.Option(help="Keys to take; each gets its own files.")] = ["text"],  # noqa: B006
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    tokenizer_model: TokenizerModel = None,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with the end token.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenize; by default as many as the input and cores are worth."),
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="At a line that is not a JSON object with the keys.")
    ] = "stop",
) -> None:
    """Tokenize JSON lines into .bin/.idx files, byte for byte as Megatron does."""
    from mt_data.preprocess.encode import Encoding
    from mt_data.preprocess.run import Job, preprocess

    tokenizer = tokenizer_config(tokenizer_type, vocab_file=vocab_file, merge_file=merge_file, model=tokenizer_model)
    encoding = Encoding(tokenizer, tuple(json_keys), append_eod)
    job = Job(tuple(input), output_prefix, encoding, workers or default_workers(input), on_error)
    _print_report(job, preprocess(job))


@app.command("train-tokenizer", cls=ManyValues)
def train_tokenizer_command(
    input: Inputs,
    output_dir: Annotated[Path, typer.Option(help="A new folder for vocab.json, merges.txt and tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, the end of document included.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer on JSON lines or plain text."""
    from mt_data.tokenizers.train import train_tokenizer

    tokenizer = train_tokenizer(input, output_dir, vocab_size=vocab_size, key=json_key)
    _print_rows({"tokenizer": str(output_dir), "vocabulary": f"{tokenizer.vocab_size:,}", "eod": str(tokenizer.eod)})


@app.command("inspect")
def inspect_command(
    prefix: Annotated[str, typer.Argument(help="Path of a .bin/.idx pair without the suffix.")],
    document: Annotated[int | None, typer.Option(help="Show this document, counted from 0.")] = None,
    tokenizer_type: TokenizerType = None,
    vocab_file: VocabFile = None,
    merge_file: MergeFile = None,
    tokenizer_model: TokenizerModel = None,
) -> None:
    """Show what a .bin/.idx pair holds; with a tokenizer, the text of a document."""
    from mt_data.indexed.reader import IndexedReader
    from mt_data.inspection import document as document_tokens
    from mt_data.inspection import summary

    reader = IndexedReader(prefix)
    _print_rows(summary(reader))
    if document is None:
        return
    tokens = document_tokens(reader, document)
    print(f"\ndocument {document}: {len(tokens):,} tokens")
    if tokenizer_type or vocab_file or merge_file or tokenizer_model:
        from mt_data.tokenizers import build

        config = tokenizer_config(tokenizer_type, vocab_file=vocab_file, merge_file=merge_file, model=tokenizer_model)
        print(build(config).decode(tokens))
    else:
        print(*tokens)


def tokenizer_config(
    type: str | None, *, vocab_file: Path | None, merge_file: Path | None, model: Path | None
) -> TokenizerConfig:
    """The configuration that the options describe; without a type, the one that the files are of."""
    if type is None and model is not None and model.is_dir():
        from mt_data.tokenizers.build import sniff

        return sniff(model)
    inferred = "HuggingFaceTokenizer" if model else "GPT2BPETokenizer"
    named = {"vocab_file": vocab_file, "merge_file": merge_file, "model": model}
    return TokenizerConfig(type=type or inferred, **{key: str(path) for key, path in named.items() if path})


def _print_report(job: "Job", report: "Report") -> None:
    if report.skipped:
        for problem in report.examples:
            print(f"skipped {problem.where}: {problem.found}", file=sys.stderr)
        if report.skipped > len(report.examples):
            print(f"skipped {report.skipped - len(report.examples):,} more lines", file=sys.stderr)
    rows = {"documents": f"{report.documents:,}", "skipped lines": f"{report.skipped:,}"}
    for key in job.encoding.keys:
        rows[job.prefix(key)] = f"{report.tokens[key]:,} tokens, {report.empty[key]:,} empty documents"
    rows["speed"] = f"{report.bytes / 1e6 / max(report.seconds, 1e-9):.1f} MB/s, {report.seconds:.1f} s"
    _print_rows(rows)


def _print_rows(rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
