"""`mt data inspect`, `check`, `blend`, `plan`, `merge` and `train-tokenizer`; only `mt` imports this.

Heavy imports are made where they are used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mt_core.cli.completion import complete_settings, preset_names
from mt_core.cli.options import expand_options
from mt_core.errors import MtError, Problem, raise_if
from mt_data.options import TokenizerOptions, print_rows, print_table

if TYPE_CHECKING:
    from mt_core.config.sections import Section
    from mt_data.tools.epoch_plan import SourcePlan


COLUMNS = ("source", "share", "tokens", "samples", "epochs")


def _load_tree() -> "type[Section]":
    from mt_data.tools.plan import data_plan_config_type

    return data_plan_config_type()


@expand_options
def inspect(
    prefix: Annotated[str, typer.Argument(help="Path of a .bin/.idx pair without the suffix.")],
    *,
    document: Annotated[int | None, typer.Option(help="Show this document, counted from 0.")] = None,
    tokenizer: TokenizerOptions,
) -> None:
    """Show what a .bin/.idx pair holds; with a tokenizer, the text of a document.

    Example:
      mt data inspect corpus_text_document
    """
    from mt_data.indexed.reader import IndexedReader
    from mt_data.tools.inspect import read_document, summarize_index

    reader = IndexedReader(prefix)
    print_rows(summarize_index(reader))
    if document is None:
        return
    tokens = read_document(reader, document)
    print(f"\ndocument {document}: {len(tokens):,} tokens")
    if config := tokenizer.config():
        from mt_data.tokenizers import build_tokenizer

        print(build_tokenizer(config).decode(tokens))
    else:
        print(*tokens)


@expand_options
def check(
    prefixes: Annotated[list[str], typer.Argument(help="Paths of .bin/.idx pairs without the suffix.")],
    *,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Every token id must be below this.")] = None,
    tokenizer: TokenizerOptions,
) -> None:
    """Check .bin/.idx pairs from end to end: the index, its .bin and, with a vocabulary, every token id.

    Example:
      mt data check corpus_text_document
    """
    from mt_data.tools.check import check_pair

    if config := tokenizer.config():
        from mt_data.tokenizers import build_tokenizer

        size = build_tokenizer(config).vocab_size
        vocab_size = min(size, vocab_size or size)
    problems: list[Problem] = []
    for prefix in prefixes:
        result = check_pair(prefix, vocab_size=vocab_size)
        problems += result.problems
        if not result.problems:
            largest = "" if result.largest is None else f", ids up to {result.largest:,}"
            print(f"ok: {prefix}: {result.documents:,} documents, {result.tokens:,} tokens{largest}")
    raise_if(problems)


def blend(
    samples: Annotated[int, typer.Option(min=1, help="Samples to draw.")],
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens in a sample.")],
    data_path: Annotated[list[str] | None, typer.Option(help="Prefixes, or weights and prefixes in turn.")] = None,
    data_args_path: Annotated[Path | None, typer.Option(help="A file that lists them instead.")] = None,
    split: Annotated[str, typer.Option(help="Shares of training, validation and test; the first is drawn.")] = "1",
    output: Annotated[
        Path | None, typer.Option(help="Write the weights and prefixes to this file, for data-args-path.")
    ] = None,
) -> None:
    """Show how many samples and epochs a blend draws from each source.

    Example:
      mt data blend --samples 1000 --seq-length 1024 --data-path 0.3 a_text_document 0.7 b_text_document
    """
    from mt_data.config.paths import parse_paths
    from mt_data.indexed.reader import IndexedReader
    from mt_data.tools.epoch_plan import StreamSampling, count_split_tokens, make_sources, plan_sources

    if bool(data_path) == bool(data_args_path):
        raise MtError("--data-path", "either it or --data-args-path is needed, and not both", "give one of them")
    paths = parse_paths(data_path or _read_words(data_args_path))
    cut = StreamSampling(seq_length)
    readers = [IndexedReader(prefix) for prefix in paths.prefixes]
    tokens = [count_split_tokens(reader, split, 0) for reader in readers]
    plans = plan_sources(make_sources(paths, tokens), samples, cut)
    print_table(COLUMNS, [_format_row(plan) for plan in plans])
    if output:
        from mt_core.files import atomic_file

        with atomic_file(output, "w") as file:
            file.writelines(
                f"{plan.source.weight or plan.source.count_per_epoch(cut)} {plan.source.prefix}\n" for plan in plans
            )
        print(f"\nwrote {output}")


def plan(
    files: Annotated[list[Path] | None, typer.Argument(help="TOML files; later ones override earlier ones.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override one: section.field=value.", autocompletion=complete_settings(_load_tree)),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Start from this preset.", autocompletion=preset_names)] = None,
) -> None:
    """Show what a run will read before step 1: samples, tokens and epochs of every source.

    Example:
      mt data plan run.toml
    """
    from mt_data.batching.batch_sizes import make_batch_sizes
    from mt_data.tools.plan import plan_run

    run_plan = plan_run(files or (), overrides or (), preset)
    rows = [(split.name, *_format_row(source)) for split in run_plan.splits for source in split.sources]
    print_table(("split", *COLUMNS), rows, left=2)
    length, sizes = run_plan.config.data.seq_length, make_batch_sizes(run_plan.config.batch).sizes()
    print()
    print_rows(
        {
            "step": f"{_format_span(sizes)} samples × {length:,} tokens = "
            f"{_format_span([n * length for n in sizes])} tokens",
            "run": f"{run_plan.config.train.steps:,} steps, {run_plan.samples:,} samples, "
            f"{run_plan.samples * length:,} tokens",
        }
    )


def _format_span(sizes: Sequence[int]) -> str:
    """A constant as it is, others from the least to the most."""
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"


def _format_row(plan: "SourcePlan") -> tuple[str, ...]:
    source = plan.source
    tokens = "unknown" if source.tokens is None else f"{source.tokens:,}"
    return source.prefix, f"{plan.share:.2%}", tokens, f"{plan.samples:,}", f"{plan.epochs:.3f}"


def _read_words(path: Path | None) -> list[str]:
    assert path is not None
    if not path.is_file():
        raise MtError(str(path), "no such file", "a file of prefixes, or of weights and prefixes in turn")
    return path.read_text("utf-8").split()


def merge(
    input: Annotated[
        list[str],
        typer.Option("--input", help="A directory of .bin/.idx pairs, their prefixes, or a quoted glob of them."),
    ],
    output_prefix: Annotated[str, typer.Option(help="The new pair is PREFIX.bin and PREFIX.idx.")],
    multimodal: Annotated[bool, typer.Option("--multimodal", help="The pairs hold a mode for each sequence.")] = False,
) -> None:
    """Join .bin/.idx pairs: those of a directory or a glob in sorted order, others in the order given.

    Example:
      mt data merge --input parts --output-prefix corpus
    """
    from mt_data.tools.merge import find_pairs
    from mt_data.tools.merge import merge_pairs as join

    merged = join(find_pairs(input), output_prefix, multimodal=multimodal)
    print_rows(
        {
            "merged": f"{merged.pairs:,} pairs",
            output_prefix: f"{merged.tokens:,} tokens, {merged.sequences:,} sequences, {merged.documents:,} documents",
        }
    )


def train_tokenizer(
    input: Annotated[list[Path], typer.Option("--input", help="One or more files; .gz and .zst are read as they are.")],
    output_dir: Annotated[Path, typer.Option(help="A new folder for the tokenizer's files.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, those of special tokens included.")],
    json_key: Annotated[str, typer.Option(help="Key of the text in .jsonl files.")] = "text",
    tokenizer_type: Annotated[
        Literal[
            "GPT2BPETokenizer",
            "BertWordPieceLowerCase",
            "BertWordPieceCase",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
        ],
        typer.Option(help="Byte-level BPE; BERT's WordPiece; SentencePiece as T5's; SentencePiece as Llama 2's (two)."),
    ] = "GPT2BPETokenizer",
    model_type: Annotated[
        Literal["unigram", "bpe"] | None,
        typer.Option(help="Of a SentencePiece model; unigram for SentencePieceTokenizer, else bpe, if not given."),
    ] = None,
    vocab_extra_ids: Annotated[
        int, typer.Option(min=0, help="How many <extra_id_…> of BERT's or T5's vocabulary; T5 needs 100.")
    ] = 0,
) -> None:
    """Train a tokenizer on JSON lines or plain text; the same text gives the same files.

    Examples:
      mt data train-tokenizer --input text.jsonl --vocab-size 8000 --output-dir tokenizer
      mt data train-tokenizer --input text.jsonl --vocab-size 8000 --output-dir t --tokenizer-type BertWordPieceCase
    """
    from mt_data.tokenizers.train import train_tokenizer as train

    tokenizer = train(
        input,
        output_dir,
        vocab_size=vocab_size,
        key=json_key,
        type=tokenizer_type,
        model_type=model_type,
        extra_ids=vocab_extra_ids,
    )
    print_rows({"tokenizer": str(output_dir), "vocabulary": f"{tokenizer.vocab_size:,}", "eod": str(tokenizer.eod)})
