"""`mt data openwebtext` and `mt data wikipedia`. Only `mt` imports this; heavy imports are made where they are used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from mt_core.cli.options import MultiValueCommand, expand_options
from mt_data.options import TokenizerOptions, print_rows

Inputs = Annotated[list[Path], typer.Option("--input", help="One or more files.")]
Output = Annotated[Path, typer.Option(help="The file to write; it appears when it is complete.")]
OnError = Annotated[Literal["stop", "skip"], typer.Option(help="At a line that is not a JSON object with the keys.")]
TextKey = Annotated[str, typer.Option(help="Key of the text.")]
IdKey = Annotated[str, typer.Option(help="Key of what tells records apart.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]

openwebtext = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a corpus of crawled pages: clean, deduplicate, decontaminate. Each step resumes where it was stopped.",
)
wikipedia = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Make a corpus of a Wikipedia dump.",
)


@openwebtext.command("blacklist-urls", cls=MultiValueCommand)
def blacklist_urls(
    input: Annotated[list[Path], typer.Option("--input", help="Files of URLs, one a line.")],
    blacklist: Annotated[Path, typer.Option(help="Sites to leave out, one name a line, such as example.com.")],
    output: Output,
) -> None:
    """Leave out URLs of blacklisted sites and of media files, malformed ones and repetitions.

    Example:
      mt data openwebtext blacklist-urls --input urls.txt --blacklist sites.txt --output kept.txt
    """
    from mt_data.corpus.urls import filter_urls

    _print_counts(output, filter_urls(input, blacklist, output))


@openwebtext.command("clean", cls=MultiValueCommand)
@expand_options
def clean_command(
    input: Inputs,
    output: Output,
    *,
    json_key: TextKey = "text",
    language: Annotated[str, typer.Option(help='Language to keep, as "en"; "any" keeps all.')] = "en",
    min_tokens: Annotated[
        int, typer.Option(min=0, help="Shorter texts are left out; words are counted if no tokenizer is given.")
    ] = 128,
    tokenizer: TokenizerOptions,
    workers: Workers = 1,
    on_error: OnError = "stop",
) -> None:
    """Repair broken encodings; leave out texts of another language and short ones.

    Example:
      mt data openwebtext clean --input pages.jsonl --output clean.jsonl --workers 4
    """
    from mt_data.corpus.clean import CleaningRules, clean

    rules = CleaningRules(json_key, language, min_tokens, tokenizer.config())
    _print_counts(output, clean(input, output, rules, workers=workers, on_error=on_error))


@openwebtext.command("find-duplicates", cls=MultiValueCommand)
def find_duplicates_command(
    input: Inputs,
    output: Output,
    json_key: TextKey = "text",
    id_key: IdKey = "url",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Write pairs that are more alike than this.")] = 0.5,
    jaccard: Annotated[
        Literal["union", "min", "max"], typer.Option(help="Shared shingles are divided by those of this set.")
    ] = "union",
    num_bands: Annotated[int, typer.Option(min=1, help="More bands find less similar pairs.")] = 10,
    num_seeds: Annotated[int, typer.Option(min=1, help="MinHash values of a document.")] = 100,
    heuristic_iter: Annotated[
        int, typer.Option(min=-1, help="Documents of a bucket to compare with the others; -1 compares all pairs.")
    ] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the hash functions.")] = 1234,
    workers: Workers = 1,
) -> None:
    """Find near-duplicates by MinHash and the similarity of their five-character shingles.

    Example:
      mt data openwebtext find-duplicates --input clean.jsonl --output pairs.jsonl
    """
    from mt_data.corpus.duplicates import DuplicateSearch, find_duplicates

    search = DuplicateSearch(
        key=json_key,
        id_key=id_key,
        threshold=threshold,
        denominator=jaccard,
        bands=num_bands,
        seeds=num_seeds,
        rounds=heuristic_iter,
        seed=seed,
    )
    _print_counts(output, find_duplicates(input, output, search, workers=workers))


@openwebtext.command("group-duplicates")
def group_duplicates_command(
    input: Annotated[Path, typer.Option("--input", help="What find-duplicates wrote.")],
    output: Output,
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Pairs at least as alike belong together.")] = 0.7,
) -> None:
    """Put documents that are alike, directly or through others, into groups.

    Example:
      mt data openwebtext group-duplicates --input pairs.jsonl --output groups.jsonl
    """
    from mt_data.corpus.groups import group_duplicates

    _print_counts(output, group_duplicates(input, output, threshold=threshold))


@openwebtext.command("remove-duplicates", cls=MultiValueCommand)
def remove_duplicates_command(
    input: Inputs,
    groups: Annotated[Path, typer.Option(help="What group-duplicates wrote.")],
    output: Output,
    id_key: IdKey = "url",
    on_error: OnError = "stop",
) -> None:
    """Keep the first document of each group.

    Example:
      mt data openwebtext remove-duplicates --input clean.jsonl --groups groups.jsonl --output unique.jsonl
    """
    from mt_data.corpus.groups import remove_duplicates

    _print_counts(output, remove_duplicates(input, groups, output, id_key=id_key, on_error=on_error))


@openwebtext.command("filter-ngrams", cls=MultiValueCommand)
def filter_ngrams_command(
    input: Inputs,
    tasks: Annotated[
        list[str], typer.Option(help="Evaluation sets: .jsonl files, as FILE or FILE:KEY, or plain text.")
    ],
    output: Output,
    json_key: TextKey = "text",
    max_ngram_size: Annotated[int, typer.Option(min=1, help="Words in an n-gram.")] = 13,
    min_ngram_size: Annotated[int, typer.Option(min=1, help="Texts with fewer words are not looked for.")] = 8,
    filter_text_char_len: Annotated[int, typer.Option(min=0, help="Pieces no longer than this are dropped.")] = 200,
    key_threshold: Annotated[int, typer.Option(min=1, help="An n-gram found so often is a common phrase.")] = 10,
    splits_count: Annotated[int, typer.Option(min=1, help="A text in more pieces is dropped.")] = 10,
    remove_char_each_side: Annotated[int, typer.Option(min=0, help="Characters cut on each side of a match.")] = 200,
    on_error: OnError = "stop",
) -> None:
    """Cut passages of evaluation sets out of the corpus.

    Example:
      mt data openwebtext filter-ngrams --input unique.jsonl --tasks lambada.jsonl --output filtered.jsonl
    """
    from mt_data.corpus.decontaminate import NgramFilter, filter_ngrams, parse_evaluation_set
    from mt_data.corpus.ngrams import NgramSizes, PassageCut

    sizes, cut = (
        NgramSizes(max_ngram_size, min_ngram_size),
        PassageCut(remove_char_each_side, filter_text_char_len, splits_count),
    )
    parsed = [parse_evaluation_set(task) for task in tasks]
    _print_counts(
        output,
        filter_ngrams(input, output, parsed, NgramFilter(json_key, sizes, cut, key_threshold), on_error=on_error),
    )


@openwebtext.command("add-id", cls=MultiValueCommand)
def add_id_command(
    input: Inputs,
    output: Output,
    id_prefix: Annotated[str, typer.Option(help="Ids are PREFIX-0000000001 and so on.")],
    id_key: Annotated[str, typer.Option(help="Key of the id.")] = "adlr_id",
    on_error: OnError = "stop",
) -> None:
    """Give each record an id.

    Example:
      mt data openwebtext add-id --input filtered.jsonl --output corpus.jsonl --id-prefix owt
    """
    from mt_data.corpus.records import add_ids

    _print_counts(output, add_ids(input, output, id_prefix, key=id_key, on_error=on_error))


@wikipedia.callback()
def _wikipedia() -> None:
    """Make a corpus of a Wikipedia dump."""


@wikipedia.command("extract", cls=MultiValueCommand)
def extract_command(
    input: Annotated[list[Path], typer.Option("--input", help="Files or folders that WikiExtractor wrote.")],
    output: Output,
    min_characters: Annotated[int, typer.Option(min=1, help="Shorter articles are left out.")] = 1,
) -> None:
    """Write the articles of an extracted dump, JSON or <doc> files, as JSON lines with text, title, url and id.

    Example:
      mt data wikipedia extract --input extracted --output wikipedia.jsonl
    """
    from mt_data.corpus.wikipedia import extract_articles

    _print_counts(output, extract_articles(input, output, min_characters=min_characters))


def _print_counts(output: Path, counts: Mapping[str, int]) -> None:
    print_rows({**{name: f"{count:,}" for name, count in counts.items()}, "output": str(output)})
