"""Cutting texts into sentences, with what is installed, and a record of what that was (docs/specs/data.md §2.5)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Literal

from mt_core.errors import MtError

SLICE_CHARACTERS = 1_000_000
"""Megatron cuts a text into slices of this length first, and each of them into sentences."""
ISO_639_1 = {
    "english": "en",
    "german": "de",
    "french": "fr",
    "spanish": "es",
    "italian": "it",
    "portuguese": "pt",
    "dutch": "nl",
    "polish": "pl",
    "russian": "ru",
    "czech": "cs",
    "danish": "da",
    "estonian": "et",
    "finnish": "fi",
    "greek": "el",
    "norwegian": "no",
    "slovene": "sl",
    "swedish": "sv",
    "turkish": "tr",
    "malayalam": "ml",
}
"""Names of languages as nltk has them, and what sentencex calls them."""


@dataclass(frozen=True, slots=True)
class SentenceSplitting:
    """How texts are cut into sentences. This is what the record next to the output says."""

    splitter: Literal["nltk punkt", "sentencex"]
    version: str
    language: str
    keep_newlines: bool = False
    """Leave the white space after a sentence with it."""


def choose_splitter(language: str = "english", *, keep_newlines: bool = False) -> SentenceSplitting:
    """nltk's punkt where its data for the language is installed, else sentencex; an `MtError` if neither can do it."""
    try:
        if _has_punkt_data(language):
            return SentenceSplitting("nltk punkt", version("nltk"), language, keep_newlines)
        import sentencex
    except ModuleNotFoundError as err:
        library = str(err.name).partition(".")[0]
        raise MtError(
            "--split-sentences", f"needs {library}, which is not installed", "pip install 'mt-data[sentences]'"
        ) from err
    del sentencex
    if language not in ISO_639_1:
        raise MtError(
            "--lang",
            f"no punkt data for {language!r} is installed, and sentencex has no such name",
            ", ".join(ISO_639_1),
        )
    return SentenceSplitting("sentencex", version("sentencex"), language, keep_newlines)


def split_sentences(text: str, splitting: SentenceSplitting) -> list[str]:
    """The sentences of a text, in order, as the library finds them."""
    spans = _punkt_spans if splitting.splitter == "nltk punkt" else _sentencex_spans
    sentences = []
    for start in range(0, len(text), SLICE_CHARACTERS):
        part = text[start : start + SLICE_CHARACTERS]
        bounds = spans(part, splitting.language)
        if splitting.keep_newlines:  # up to where the next one begins
            ends = [begin for begin, _ in bounds[1:]] + [len(part)]
            bounds = [(begin, end) for (begin, _), end in zip(bounds, ends, strict=True)]
        sentences += [part[begin:end] for begin, end in bounds]
    return sentences


def _has_punkt_data(language: str) -> bool:
    from nltk.data import find

    try:
        find(f"tokenizers/punkt_tab/{language}/")
    except LookupError:
        return False
    return True


@cache
def _load_punkt(language: str) -> Callable[[str], list[tuple[int, int]]]:
    from nltk.tokenize.punkt import PunktTokenizer

    tokenizer = PunktTokenizer(language)
    return lambda text: list(tokenizer.span_tokenize(text))


def _punkt_spans(text: str, language: str) -> list[tuple[int, int]]:
    return _load_punkt(language)(text)


def _sentencex_spans(text: str, language: str) -> list[tuple[int, int]]:
    """Spans of the sentences that sentencex finds, without the white space at their ends and without blank ones."""
    from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue]  it has no types

    bounds = []
    for boundary in get_sentence_boundaries(ISO_639_1[language], text):
        begin, end = boundary["start_index"], boundary["end_index"]
        sentence = text[begin:end]
        if stripped := sentence.strip():
            begin += len(sentence) - len(sentence.lstrip())
            bounds.append((begin, begin + len(stripped)))
    return bounds
