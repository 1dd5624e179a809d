"""What a model's configuration offers to rules, planning and checkpoints: torch-free, as everything here."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mt_core.contracts.models import Model
    from mt_core.parallel.cuts import CutSize, TensorCut
    from mt_core.planning.layer_costs import LayerCosts, RankShape


@runtime_checkable
class ModelConfig(Protocol):
    """Kind `model`. A frozen, torch-free `Section` with a literal `kind` field."""

    @property
    def kind(self) -> str:
        """Which model it is."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids, before any padding."""
        ...

    @property
    def max_seq_len(self) -> int:
        """Longest sequence in tokens that the model takes."""
        ...

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        """Plain values, as pydantic gives them."""
        ...

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self:
        """A copy with some fields changed, as pydantic makes it."""
        ...

    def build(self, tensor: int = 1) -> "Model":
        """The whole module, to be cut for `tensor` ranks, uninitialised, on the default device (imports torch)."""
        ...

    def canonical_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model."""
        ...

    def canonical_cuts(self) -> "Mapping[str, TensorCut]":
        """How ranks divide each canonical tensor, of those that they divide."""
        ...

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """A batch around random tokens, for `mt verify`: all the model takes but the loss mask, and labels where it has
        others than one for each token."""
        ...

    def flops_per_token(self, sequence: int, /) -> float:
        """Forward and backward multiply-adds × 2 per token, causal attention counted at half.

        A model of an encoder and a decoder is also given the decoder's length, and counts per token of the encoder.
        """
        ...


class AttentionConfig(Protocol):
    """What rules and `mt verify` read of a transformer's attention."""

    @property
    def heads(self) -> int:
        """Query heads."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads; divides `heads`."""
        ...

    @property
    def head_size(self) -> int:
        """Features per head."""
        ...

    @property
    def core(self) -> str:
        """A component of kind `attention`, or "auto"."""
        ...

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key/value head."""
        ...

    def model_copy(self, *, update: Mapping[str, Any] | None = None) -> Self:
        """A copy with some fields changed, as pydantic makes it."""
        ...


class MLPConfig(Protocol):
    """What rules and `mt verify` read of a transformer's feed-forward layer."""

    @property
    def kind(self) -> str:
        """One of dense, gated and moe."""
        ...

    @property
    def ffn_hidden_size(self) -> int:
        """Hidden features, of each expert if there are any."""
        ...


class TransformerModelConfig(ModelConfig, Protocol):
    """The configuration of a model made of attention and feed-forward layers."""

    @property
    def layers(self) -> int:
        """Transformer blocks; of a model with a decoder, those of the encoder."""
        ...

    @property
    def total_layers(self) -> int:
        """Transformer blocks of the whole model, which stages of a pipeline divide; a model without it has none."""
        ...

    @property
    def layer_keys(self) -> str:
        """The keys of the configuration that add up to `total_layers`."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        ...

    @property
    def attention(self) -> AttentionConfig:
        """Attention of every block."""
        ...

    @property
    def mlp(self) -> MLPConfig:
        """Feed-forward layer of every block."""
        ...

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights."""
        ...

    @property
    def vocab_divisor(self) -> int:
        """Embedding rows are padded to a multiple of this."""
        ...

    def cut_sizes(self) -> "Sequence[CutSize]":
        """The sizes that ranks divide, of all parts of the model."""
        ...


class PlannedModelConfig(TransformerModelConfig, Protocol):
    """The configuration of a model that `mt plan` can count."""

    def layer_costs(self, shape: "RankShape", layers: Sequence[int] | None = None, /) -> "LayerCosts":
        """What one of these layers costs a rank in one micro-batch, on average; of all layers if None or empty."""
        ...

    def layer_flops(self, sequence: int, layers: Sequence[int], /) -> float:
        """The part of `flops_per_token` that is in these layers."""
        ...
