"""Perplexity of any held-out text: per token, and in bits per byte, which compares models with different vocabularies.

Documents stand one after another, as in training. The first token of each is predicted too: from what the tokenizer
puts before a text, else from an end of document. What the tokenizer puts there is never predicted itself.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from mt_core.errors import MtError
from mt_data.text_io import texts
from mt_eval.encoding import TextEncoder
from mt_eval.tasks.scoring import TokenizedText, compute_perplexity


def read_documents(path: Path) -> list[tuple[str, str]]:
    """Where it stands and the text of every document that is not empty: JSON lines, rows or a file, by its name."""
    documents = [(where, text) for where, text in texts.read_documents(path) if text]
    if not documents:
        raise MtError(str(path), "holds no text", "a file with at least one character")
    return documents


def prepare(documents: Sequence[tuple[str, str]], encoder: TextEncoder) -> tuple[TokenizedText, int]:
    """All documents in one sequence, an end of document between two, and their size in UTF-8 bytes."""
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
    return TokenizedText(sequence, frozenset(unscored), places), sum(len(text.encode()) for _, text in documents)


def compute_metrics(loss_sum: float, text: TokenizedText, size: int) -> dict[str, float]:
    """Perplexity, bits per byte and mean loss of a text of `size` bytes whose losses add up to `loss_sum` nats."""
    loss = loss_sum / text.num_scored
    return {"perplexity": compute_perplexity(loss), "bits_per_byte": loss_sum / math.log(2) / size, "loss": loss}
