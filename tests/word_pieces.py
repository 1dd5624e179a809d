"""The toy vocabulary and documents of docs/specs/data.md §5.2 and §5.3."""

from pathlib import Path

import numpy as np

from mt_data.config import TokenizerConfig
from mt_data.indexed.writer import IndexedWriter

DOCUMENTS = [
    [[5, 6, 7, 8, 9], [10, 11, 5, 13], [16, 17, 14]],
    [[18, 19, 5, 8]],
    [[5, 13, 16, 10, 14], [8, 9, 12, 11], [18, 8, 14], [19, 13, 9, 10]],
]
NAMES = {0: "[PAD]", 1: "[UNK]", 2: "[CLS]", 3: "[SEP]", 4: "[MASK]", 20: "[BOS]", 21: "[EOS]"}
NAMES |= {22 + i: f"<extra_id_{i}>" for i in range(10)} | {i: f"##t{i}" for i in (7, 10, 12, 17)}


def toy_tokenizer(folder: Path) -> TokenizerConfig:
    """32 WordPieces, of which 7, 10, 12 and 17 go on with a word; 22 to 31 are sentinels."""
    path = folder / "vocab.txt"
    path.write_text("".join(NAMES.get(i, f"t{i}") + "\n" for i in range(32)), "utf-8")
    return TokenizerConfig(type="BertWordPieceCase", vocab_file=str(path), vocab_extra_ids=10)


def toy_corpus(folder: Path, documents: list[list[list[int]]] | None = None, name: str = "toy") -> str:
    """The documents as a pair of files, a sequence for each sentence."""
    with IndexedWriter(folder / name, np.dtype("uint16")) as writer:
        for sentences in documents or DOCUMENTS:
            writer.add_document(np.concatenate(sentences), np.array([len(sentence) for sentence in sentences]))
    return str(folder / name)
