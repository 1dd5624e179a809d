"""Perplexity of any held-out text: per token, and in bits per byte, which compares models with different vocabularies.

Documents stand one after another, as in training. The first token of each is predicted too: from what the tokenizer
puts before a text, else from an end of document. What the tokenizer puts there is never predicted itself.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mt_core.errors import MtError
from mt_data.text_io import texts
from mt_eval.encoding import TextEncoder
from mt_eval.report import Sample
from mt_eval.standard_errors import compute_ratio, pair_errors
from mt_eval.tasks.scoring import TokenizedText, compute_perplexity, compute_perplexity_stderr


def read_documents(path: Path) -> list[tuple[str, str]]:
    """Where it stands and the text of every document that is not empty: JSON lines, rows or a file, by its name."""
    documents = [(where, text) for where, text in texts.read_documents(path) if text]
    if not documents:
        raise MtError(str(path), "holds no text", "a file with at least one character")
    return documents


def prepare(documents: Sequence[tuple[str, str]], encoder: TextEncoder) -> tuple[TokenizedText, list[int]]:
    """All documents in one sequence, an end of document between two, and the size of each in UTF-8 bytes."""
    sequence, unscored, places = [], set(), []
    end = () if documents[1:] == [] and encoder.prefix else (encoder.tokenizer.eod,)
    for (where, _), tokens in zip(documents, encoder.encode_batch([text for _, text in documents]), strict=True):
        if sequence or not encoder.prefix:
            sequence += end
        if encoder.prefix != end or not sequence:
            unscored.update(range(len(sequence), len(sequence) + len(encoder.prefix)))
            sequence += encoder.prefix
        places.append((len(sequence), where))
        sequence += tokens
    return TokenizedText(sequence, frozenset(unscored), places), [len(text.encode()) for _, text in documents]


def compute_metrics(losses: Sequence[float], text: TokenizedText, sizes: Sequence[int]) -> dict[str, float]:
    """Perplexity, bits per byte and mean loss of documents of so many bytes whose losses add up to so many nats each.

    Each has its standard error over documents, if there are several.
    """
    loss, error = compute_ratio(losses, text.count_scored())
    values = {
        "perplexity": (compute_perplexity(loss), compute_perplexity_stderr(loss, error)),
        "bits_per_byte": compute_ratio([each / math.log(2) for each in losses], sizes),
        "loss": (loss, error),
    }
    return pair_errors(values)


def list_samples(losses: Sequence[float], text: TokenizedText, sizes: Sequence[int]) -> Iterator[Sample]:
    """A line for each document: where it stands, tokens that are predicted, bytes, and the sum of losses in nats."""
    for (_, where), tokens, size, loss in zip(text.documents, text.count_scored(), sizes, losses, strict=True):
        yield {"where": where, "tokens": tokens, "bytes": size, "loss_sum": loss}
