"""Real input: the files of ../shared/data, and small corpora written by the package's own writer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mt_data.config import TokenizerConfig
from mt_data.indexed.writer import IndexedWriter

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture
def gpt2() -> TokenizerConfig:
    """GPT-2's own vocabulary and merges."""
    folder = shared("gpt2")
    return TokenizerConfig(vocab_file=str(folder / "vocab.json"), merge_file=str(folder / "merges.txt"))


@pytest.fixture
def texts() -> list[str]:
    """Tiny Shakespeare in paragraphs, an empty document among them."""
    paragraphs = shared("tinyshakespeare.txt").read_text("utf-8").split("\n\n")[:400]
    return [*paragraphs[:200], "", *paragraphs[200:]]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    """The texts, one JSON object a line."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[[str, Sequence[int]], str]:
    """Write a pair of sequences of the given lengths; token j of sequence i (from 1) is 100 · i + j."""

    def write(name: str, lengths: Sequence[int]) -> str:
        with IndexedWriter(tmp_path / name, np.dtype("uint16")) as writer:
            for i, length in enumerate(lengths, start=1):
                writer.add_documents(100 * i + np.arange(length), np.array([length]))
        return str(tmp_path / name)

    return write
