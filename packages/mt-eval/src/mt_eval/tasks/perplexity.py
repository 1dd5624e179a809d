"""Perplexity of any held-out text: per token, and in bits per byte, which compares models with different vocabularies.

Every document follows an end-of-document token, as in training, so its first token is predicted too.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_eval.documents import read_json_lines, read_text
from mt_eval.tasks.scoring import compute_perplexity


def read_documents(path: Path) -> list[str]:
    """Documents of a JSONL file, one a line under "text", or any other file as one document."""
    texts = (text for _, text in read_json_lines(path)) if path.suffix == ".jsonl" else [read_text(path)]
    documents = [text for text in texts if text]
    if not documents:
        raise MtError(str(path), "holds no text", "a file with at least one character")
    return documents


def prepare(documents: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """Tokens of all documents in one sequence, and their size in UTF-8 bytes."""
    sequence: list[int] = []
    for tokens in tokenizer.encode_batch(documents):
        sequence += [tokenizer.eod, *tokens]
    return sequence, sum(len(document.encode()) for document in documents)


def compute_metrics(loss_sum: float, tokens: Sequence[int], size: int) -> dict[str, float]:
    """Perplexity, bits per byte and mean loss of a text of `size` bytes whose losses add up to `loss_sum` nats."""
    loss = loss_sum / (len(tokens) - 1)
    return {"perplexity": compute_perplexity(loss), "bits_per_byte": loss_sum / math.log(2) / size, "loss": loss}
