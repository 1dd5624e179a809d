"""WikiText-103 perplexity per original word, as published for Megatron (docs/specs/evaluation.md §3.2).

The model reads detokenised text, T tokens of it; its loss is spread over the To words of the word-tokenised file, so
models with different vocabularies compare: adjusted perplexity = exp(loss · (T−1)/(To−1)).
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from mt_core.errors import MtError
from mt_eval.encoding import TextEncoder
from mt_eval.report import Sample
from mt_eval.standard_errors import compute_ratio, pair_errors
from mt_eval.tasks.detokenization import detokenize
from mt_eval.tasks.scoring import TokenizedText, compute_perplexity, compute_perplexity_stderr

TITLE = re.compile(r"(?:^|(?<=\n \n)|(?<=\n\n)) ?(= [^=\n]+ =) ?(?:\n ?\n|$)")
"""The line that begins an article, between empty ones; titles of its sections have more signs."""
SEAM = 100
"""Characters before an article that are encoded with it, so that its tokens are those that it has inside the text."""


def prepare(
    raw: str, encoder: TextEncoder, where: str = "text", detokenizer: str = "wikitext"
) -> tuple[TokenizedText, list[int]]:
    """Tokens of the stripped and detokenised text, and for each article the number of words in the stripped original.

    Words are the pieces between single spaces, line breaks included: 245,566 in the test set.
    """
    raw = raw.strip()
    if raw.count(" ") < 1:
        raise MtError(where, "holds no two words", "the word-tokenised file, with spaces between words")
    text = detokenize(raw, detokenizer)
    size = len(encoder.prefix)
    tokens = [*encoder.prefix, *encoder.encode_plain(text)]
    titles = list(_find_titles(raw, text, detokenizer))
    words = [raw.count(" ", first, last) for first, last in pairwise([0, *(each[1] for each in titles[1:]), len(raw)])]
    words[0] += 1
    places = [size]
    for (_, _, first), (_, _, last) in pairwise(titles):
        before = text[max(0, first - SEAM) : first]
        places.append(min(places[-1] + len(encoder.encode_pair(before, text[first:last])[1]), len(tokens) - 1))
    names = [f"{where}, {title}" if title else where for title, _, _ in titles]
    return TokenizedText(tokens, frozenset(range(size)), list(zip(places, names, strict=True))), words


def _find_titles(raw: str, text: str, detokenizer: str) -> Iterator[tuple[str, int, int]]:
    """The title of each article, and where it begins in the original and in the detokenised text.

    Line breaks before a title belong to its article, as tokenizers join them, and so does what stands before the first
    one. A text without titles is one article.
    """
    place, first = 0, True
    for heading in TITLE.finditer(raw):
        title = detokenize(heading[1], detokenizer)
        match = re.search(f"(?<!=){re.escape(title)}(?!=)", text[place:])
        if match is None:  # a rule joined it to another line
            continue
        before = text[: place + match.start()].rstrip()
        yield title, 0 if first else heading.start(), 0 if first else len(before)
        place, first = place + match.end(), False
    if first:
        yield "", 0, 0


def compute_metrics(losses: Sequence[float], text: TokenizedText, words: Sequence[int]) -> dict[str, float]:
    """Adjusted perplexity first: it is the one that is published. Standard errors are those over articles."""
    loss, error = compute_ratio(losses, text.count_scored())
    spaces = [words[0] - 1, *words[1:]]
    word_loss, word_error = compute_ratio(losses, spaces)
    values = {
        "adjusted_perplexity": (compute_perplexity(word_loss), compute_perplexity_stderr(word_loss, word_error)),
        "token_perplexity": (compute_perplexity(loss), compute_perplexity_stderr(loss, error)),
        "loss": (loss, error),
        "token_ratio": (text.num_scored / sum(spaces), None),
    }
    return pair_errors(values)


def list_samples(losses: Sequence[float], text: TokenizedText, words: Sequence[int]) -> Iterator[Sample]:
    """A line for each article: where it stands, tokens that are predicted, original words, and the sum of losses in
    nats."""
    for (_, where), tokens, count, loss in zip(text.documents, text.count_scored(), words, losses, strict=True):
        yield {"where": where, "tokens": tokens, "original_words": count, "loss_sum": loss}
