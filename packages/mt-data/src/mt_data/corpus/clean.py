"""Cleaning: broken encodings repaired, texts of another language or too short left out (ftfy, py3langid)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_data.config import TokenizerConfig
from mt_data.corpus.records import OnError, Record, RecordTransform, read_lines
from mt_data.corpus.step import CorpusStep, run_step
from mt_data.text_io.lines import check_inputs
from mt_data.tokenizers import build_tokenizer

CHARACTERS_PER_TOKEN = 8
"""A text with this many characters for each token of `min_tokens` is long enough without counting."""


@dataclass(frozen=True, slots=True)
class CleaningRules:
    """What a text must be."""

    key: str = "text"
    language: str = "en"
    """ISO 639-1 code; "any" takes every language."""
    min_tokens: int = 128
    """Tokens of the tokenizer, or words if there is none."""
    tokenizer: TokenizerConfig | None = None


def clean(
    inputs: Sequence[Path], output: Path, rules: CleaningRules, *, workers: int = 1, on_error: OnError = "stop"
) -> dict[str, int]:
    """Repair and filter records; the others of their keys stay as they are."""
    check_inputs(inputs)
    _import("ftfy")
    check_language(rules.language)
    if rules.tokenizer:
        build_tokenizer(rules.tokenizer)  # a mistake shows before any work
    options = {"rules": repr(rules), "on_error": on_error}
    step = CorpusStep("clean", output, tuple(inputs), options, workers)
    each = RecordTransform(partial(clean_record, rules), (rules.key,), on_error)
    return run_step(step, read_lines(inputs), each)


def check_language(language: str) -> None:
    """Refuse a language that the identifier does not tell apart."""
    known = sorted(label for label, _ in _import("py3langid").rank("text"))
    if language not in (*known, "any"):
        raise MtError("--language", f"{language!r}", f"any, {', '.join(known)}")


def clean_record(rules: CleaningRules, record: Record, number: int) -> tuple[list[Record], str]:
    """The repaired record, or none and why."""
    text = _import("ftfy").fix_text(record[rules.key])
    if rules.language != "any" and _import("py3langid").classify(text)[0] != rules.language:
        return [], "other language"
    if len(text) < CHARACTERS_PER_TOKEN * rules.min_tokens and _count_tokens(text, rules) < rules.min_tokens:
        return [], "too short"
    return [{**record, rules.key: text}], "kept" if text == record[rules.key] else "repaired"


def _count_tokens(text: str, rules: CleaningRules) -> int:
    return (
        len(_build_tokenizer(rules.tokenizer).encode(text))  # pyright: ignore[reportArgumentType] - frozen, so hashable
        if rules.tokenizer
        else len(text.split())
    )


@cache
def _build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Built once in each process."""
    return build_tokenizer(config)


def _import(library: str) -> ModuleType:
    return import_library(library, where="mt data openwebtext clean", requires=["mt-data[corpus]"])
