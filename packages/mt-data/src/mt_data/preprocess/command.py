"""`mt data preprocess`. Only `mt` imports this; heavy imports are made where they are used."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mt_core.cli.options import expand_options
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.options import TokenizerOptions, print_rows

if TYPE_CHECKING:
    from mt_data.preprocess.job import PreprocessJob
    from mt_data.preprocess.report import PreprocessReport
    from mt_data.preprocess.sentences import SentenceSplitting

BYTES_WORTH_A_WORKER = 4 << 20


Inputs = Annotated[
    list[Path],
    typer.Option(
        "--input", help="Files, directories or quoted globs: .jsonl .json .ndjson .parquet .txt; .gz .zst .bz2."
    ),
]
OutputPrefix = Annotated[str, typer.Option(help="Output is PREFIX_KEY_document.bin and .idx.")]
JsonKeys = Annotated[list[str], typer.Option(help="Keys to take; each gets its own files.")]
InputFormats = Annotated[
    Literal["auto", "jsonl", "parquet", "text"], typer.Option(help="What the files are; auto: by their names.")
]
TextDocuments = Annotated[
    Literal["file", "line"], typer.Option(help="A document of a text file: all of it, or each line.")
]
AppendEod = Annotated[bool, typer.Option("--append-eod", help="End each document with the end token.")]
SplitSentences = Annotated[
    bool, typer.Option("--split-sentences", help="Make every sentence a sequence, for BERT, T5 and ICT.")
]
KeepNewlines = Annotated[bool, typer.Option("--keep-newlines", help="Leave the white space after a sentence with it.")]
Language = Annotated[str, typer.Option(help="Language of the sentences.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Processes that tokenize; by default as many as the input and cores are worth."),
]
Partitions = Annotated[
    int, typer.Option(min=1, help="Deal documents out to so many parts and join these: Megatron's order.")
]
KeepSequential = Annotated[
    bool, typer.Option("--keep-sequential-samples", help="Keep the order of the input whatever the partitions.")
]
Shard = Annotated[str, typer.Option(help="I/N: only part I (from 0) of N, for job arrays; then mt data merge.")]
Engines = Annotated[Literal["local", "ray"], typer.Option(help="Where the workers run.")]
OnBadLine = Annotated[Literal["stop", "skip"], typer.Option(help="At a line that is not a document with the keys.")]
MaxLine = Annotated[float, typer.Option(min=0, help="Longest line or text file in MiB; longer is an error.")]
LogInterval = Annotated[
    int | None,
    typer.Option(min=1, help="Documents between lines of progress; by default a bar, or a line every 10 s."),
]


@expand_options
def preprocess(
    input: Inputs,
    output_prefix: OutputPrefix,
    *,
    json_keys: JsonKeys = ["text"],  # noqa: B006
    input_format: InputFormats = "auto",
    text_documents: TextDocuments = "file",
    tokenizer: TokenizerOptions,
    append_eod: AppendEod = False,
    split_sentences: SplitSentences = False,
    keep_newlines: KeepNewlines = False,
    lang: Language = "english",
    workers: Workers = None,
    partitions: Partitions = 1,
    keep_sequential_samples: KeepSequential = False,
    shard: Shard = "0/1",
    engine: Engines = "local",
    on_error: OnBadLine = "stop",
    max_line_mb: MaxLine = 32,
    log_interval: LogInterval = None,
) -> None:
    """Tokenize texts into .bin/.idx files, byte for byte as Megatron does; run again, a stopped job goes on.

    Example:
      mt data preprocess --input text.jsonl --tokenizer-model tokenizer --append-eod --output-prefix corpus
    """
    from mt_data.preprocess.encoding import EncodingOptions
    from mt_data.preprocess.job import PreprocessJob
    from mt_data.preprocess.run import preprocess as run
    from mt_data.text_io.inputs import find_inputs

    splitting = _choose_splitting(lang, split_sentences, keep_newlines=keep_newlines)
    files = [Path(file.path) for file in find_inputs(input, input_format)]
    job = PreprocessJob(
        inputs=tuple(input),
        output_prefix=output_prefix,
        encoding=EncodingOptions(tokenizer.config() or TokenizerConfig(), tuple(json_keys), append_eod, splitting),
        workers=workers or choose_worker_count(files),
        on_error=on_error,
        input_format=input_format,
        text_documents=text_documents,
        max_line_mb=max_line_mb,
        partitions=1 if keep_sequential_samples else partitions,
        shard=parse_shard(shard),
        engine=engine,
        log_interval=log_interval,
    )
    print_report(job, run(job))


def _choose_splitting(language: str, enabled: bool, *, keep_newlines: bool) -> "SentenceSplitting | None":
    from mt_data.preprocess.sentences import choose_splitter

    if keep_newlines and not enabled:
        raise MtError("--keep-newlines", "has no meaning without --split-sentences", "give both, or neither")
    return choose_splitter(language, keep_newlines=keep_newlines) if enabled else None


def choose_worker_count(inputs: list[Path]) -> int:
    """A process for every few megabytes, as starting one takes as long as tokenizing that; no more than cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(path.stat().st_size for path in inputs if path.is_file())
    return max(1, min(cores, size // BYTES_WORTH_A_WORKER))


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` as two numbers."""
    part, slash, parts = text.partition("/")
    if not slash or not part.isdecimal() or not parts.isdecimal():
        raise MtError("--shard", f"{text!r}", "I/N, such as 0/4 to 3/4")
    return int(part), int(parts)


def print_report(job: "PreprocessJob", report: "PreprocessReport") -> None:
    """The closing table on stdout, and skipped lines on stderr."""
    if report.skipped:
        for problem in report.examples:
            print(f"skipped {problem.where}: {problem.actual}", file=sys.stderr)
        if report.skipped > len(report.examples):
            print(f"skipped {report.skipped - len(report.examples):,} more lines", file=sys.stderr)
    rows = {"documents": f"{report.documents:,}", "skipped lines": f"{report.skipped:,}"}
    for key in job.encoding.keys:
        tokens, empty = report.tokens.get(key, 0), report.empty.get(key, 0)
        rows[job.prefix(key)] = f"{tokens:,} tokens, {empty:,} empty documents"
        if job.encoding.splitting:
            rows[job.prefix(key)] += f", {report.sequences.get(key, 0):,} sentences"
    if job.encoding.splitting:
        rows["sentences by"] = f"{job.encoding.splitting.splitter} {job.encoding.splitting.version}"
    if report.all_tokens:
        rows["bytes a token"] = f"{report.bytes / report.all_tokens:.2f}"
    rows["speed"] = f"{report.megabytes_per_second:.1f} MB/s, {report.seconds:.1f} s"
    print_rows(rows)
