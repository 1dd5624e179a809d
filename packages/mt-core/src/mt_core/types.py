"""What an implementation of each kind of component must offer. Contracts only: nothing here runs.

torch types appear as forward references, so this module imports without torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn


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
        """Write all files that `mt_data.tokenizers.load` needs to build this tokenizer again."""
        ...


class ModelConfig(Protocol):
    """Kind `model`. A frozen, torch-free `Section` with a literal `kind` field."""

    kind: str
    vocab_size: int
    """Number of token ids, before any padding."""
    max_positions: int
    """Longest sequence in tokens that the model takes."""

    def build(self) -> "nn.Module":
        """The module on the current default device and dtype, parameters uninitialised (imports torch)."""
        ...

    def canonical_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model (DESIGN §6)."""
        ...

    def flops_per_token(self, sequence: int) -> float:
        """Forward and backward multiply-adds × 2 per token, causal attention counted at half."""
        ...


class Model(Protocol):
    """What `ModelConfig.build` returns, besides being an `nn.Module`."""

    config: Any

    def token_losses(self, tokens_BT: "Tensor", labels_BT: "Tensor") -> "Tensor":
        """Cross-entropy of each label in nats, [B, T], fp32 or wider, not reduced."""
        ...

    def initialize(self, seed: int) -> None:
        """Fill every parameter; the values depend on the seed and the parameter's name only."""
        ...

    def to_canonical(self, name: str, tensor: "Tensor") -> Iterable[tuple[str, "Tensor"]]:
        """Split a (possibly fused, possibly padded) tensor shaped like parameter `name` into canonical ones."""
        ...

    def from_canonical(self, name: str, get: "Callable[[str], Tensor]") -> "Tensor":
        """The reverse: a tensor shaped like parameter `name` from canonical ones."""
        ...


class Dataset(Protocol):
    """Kind `dataset` builds this: samples in training order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Numpy arrays: `tokens`, `labels` int64 [T] and `loss_mask` float32 [T]."""
        ...


class CheckpointLoader(Protocol):
    """Kind `ckpt-loader`: configuration and canonical tensors of a checkpoint in some format."""

    def __init__(self, path: Path) -> None: ...

    def config(self) -> ModelConfig:
        """The model's configuration, or one `MtError` naming everything in it that mt does not implement."""
        ...

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        """Canonical name and tensor, one at a time."""
        ...

    def tokenizer_files(self) -> Sequence[Path]:
        """Files of the tokenizer that travels with the checkpoint; empty if none does."""
        ...


class CheckpointSaver(Protocol):
    """Kind `ckpt-saver`: a function that writes a checkpoint in some format, whole or not at all."""

    def __call__(
        self,
        path: Path,
        config: ModelConfig,
        tensors: Iterable[tuple[str, "Tensor"]],
        tokenizer_files: Sequence[Path] = (),
    ) -> None:
        """Write `tensors` (canonical names) and copies of the tokenizer's files under `path`."""
        ...


class MetricSink(Protocol):
    """Receives every line of metrics.jsonl as it is written."""

    name: ClassVar[str]

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one line; `metrics["step"]` is the optimizer step."""
        ...

    def close(self) -> None:
        """Flush; called once, at the end of the run."""
        ...
