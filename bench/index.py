"""Index building and sample access at scale: one figure a line. Run with `python bench/index.py [--small]`.

Lengths are synthetic (log-normal, 10 million documents, 10 billion tokens); tokens are read from a real file of 2 GB.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mt_data.blending.blend import blend_by_weights
from mt_data.datasets.gpt.dataset import build_gpt_dataset
from mt_data.datasets.gpt.indices import IndexRequest, build_indices, build_sample_index
from mt_data.datasets.masking.sentence_mapping import Sentences, SentenceSampling, build_sentence_mapping
from mt_data.indexed.cache import IndexCache
from mt_data.indexed.reader import IndexedReader
from mt_data.indexed.writer import IndexedWriter

SEQ_LENGTH = 2048


@contextmanager
def timed(label: str, count: int | None = None, unit: str = "") -> Iterator[None]:
    """Print the seconds that a block takes, and how many things a second that is."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    rate = f", {count / seconds:,.0f} {unit}/s" if count else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{label}: {seconds:.3f} s{rate}, peak memory {peak:.2f} GiB", flush=True)


def document_lengths(documents: int, mean: float) -> np.ndarray:
    """Synthetic lengths, int32."""
    lengths = np.random.default_rng(0).lognormal(0, 1, documents)
    return (lengths * (mean / lengths.mean())).astype(np.int32) + 1


class Lengths:
    """A corpus of which only the lengths exist."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """No tokens."""
        raise NotImplementedError


def bench_index(documents: int, folder: Path) -> None:
    """Build and open the indexes of one epoch."""
    corpus = Lengths(document_lengths(documents, 1000))
    request = IndexRequest(range(documents), None, SEQ_LENGTH, 1234)
    samples = int(corpus.lengths.sum(dtype=np.int64)) // SEQ_LENGTH
    with timed(f"all three indexes, {documents:,} documents, {samples:,} samples", samples, "samples"):
        indices = build_indices(corpus.lengths, request)
    with timed("the sample index alone", samples, "samples"):
        build_sample_index(corpus.lengths, indices.document, request)
    cache = IndexCache(folder)
    with timed("the same, written to the cache"):
        build_gpt_dataset(corpus, request, cache)
    for _ in range(3):
        with timed("opening it"):
            build_gpt_dataset(corpus, request, cache)


def bench_access(tokens: int, folder: Path, reads: int) -> None:
    """Samples in random order from the page cache, on one core."""
    lengths = document_lengths(tokens // 1000, 1000)
    with IndexedWriter(folder / "corpus", np.dtype("uint16")) as writer:
        for block in np.array_split(lengths, max(1, tokens // 10**7)):
            writer.add_documents(np.random.default_rng(0).integers(0, 50_000, int(block.sum())), block)
    reader = IndexedReader(folder / "corpus")
    dataset = build_gpt_dataset(reader, IndexRequest(range(len(reader)), None, SEQ_LENGTH, 1), IndexCache(folder))
    order = np.random.default_rng(1).integers(0, len(dataset), reads).tolist()
    for label in ("first reads", "random samples of 2,048 tokens"):
        with timed(label, reads, "samples"):
            for index in order:
                dataset[index]


def bench_blend(samples: int) -> None:
    """Blends of 100 datasets with weights of several spreads."""
    random = np.random.default_rng(0)
    weights: dict[str, Callable[[], np.ndarray]] = {
        "0.5 to 1": lambda: random.uniform(0.5, 1, 100),
        "equal": lambda: np.ones(100),
        "1/rank": lambda: 1 / np.arange(1, 101),
        "1e-4 to 1": lambda: 10 ** random.uniform(-4, 0, 100),
    }
    for name, draw in weights.items():
        values = draw().tolist()
        with timed(f"blend of 100 datasets, weights {name}", samples, "samples"):
            blend_by_weights(values, samples)


def bench_mapping(sentences: int) -> None:
    """BERT's mapping of sentences of 5 to 60 tokens, 30 a document."""
    lengths = np.random.default_rng(0).integers(5, 60, sentences).astype(np.int32)
    corpus = Sentences(lengths, np.arange(0, sentences + 1, 30))
    start = time.perf_counter()
    rows = build_sentence_mapping(corpus, SentenceSampling(125, 2, 0.1, 1, samples=None))
    seconds = time.perf_counter() - start
    print(f"BERT mapping, {sentences:,} sentences: {seconds:.2f} s, {len(rows) / seconds:,.0f} samples/s")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a hundredth of everything")
    scale = 100 if parser.parse_args().small else 1
    with tempfile.TemporaryDirectory() as folder:
        bench_index(10_000_000 // scale, Path(folder))
        bench_access(10**9 // scale, Path(folder), 100_000 // scale)
        bench_blend(10_000_000 // scale)
        bench_mapping(3_000_000 // scale)


if __name__ == "__main__":
    main()
