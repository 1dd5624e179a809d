"""What tokenizers and datasets offer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """Kind `tokenizer`. Text to token ids and back."""

    vocab_size: int
    """Number of ids, before any padding; every id is below it."""
    eod: int
    """Id that ends a document."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; adds no special tokens of its own."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, directory: Path) -> None:
        """Write all files that `mt_data.tokenizers.load_tokenizer` needs to build this tokenizer again."""
        ...


@runtime_checkable
class DataSection(Protocol):
    """What mt-core reads of the data section."""

    @property
    def seq_length(self) -> int:
        """Tokens in a sample; of an encoder's sequence where there is a decoder's too."""
        ...


class Dataset(Protocol):
    """Kind `dataset` builds this: samples in training order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Numpy arrays of one sample, of the same keys and shapes for every sample; the keys depend on the kind.

        Data for next-token models give `tokens`, `labels` int64 [T] and `loss_mask` float32 [T]; BERT, T5 and ICT say
        theirs in their datasets.
        """
        ...
