"""What an implementation of each kind of component must offer. Contracts only: nothing here runs.

torch types appear as forward references, so this module imports without torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from mt_core.parallel.cuts import CutSize, TensorCut
    from mt_core.parallel.tensor.plan import Plan
    from mt_core.planning.layer_costs import LayerCosts, RankShape


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

    def build(self, tensor: int = 1) -> "nn.Module":
        """The whole module, to be cut for `tensor` ranks, uninitialised, on the default device (imports torch)."""
        ...

    def canonical_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor in a checkpoint of this model."""
        ...

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """A batch around random tokens, for `mt verify`: all the model takes but labels and loss mask."""
        ...

    def flops_per_token(self, sequence: int, /) -> float:
        """Forward and backward multiply-adds × 2 per token, causal attention counted at half.

        A model of an encoder and a decoder is also given the decoder's length, and counts per token of the encoder.
        """
        ...


class AttentionConfig(Protocol):
    """What rules, planning and `mt verify` read of a transformer's attention."""

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
    """What planning and `mt verify` read of a transformer's feed-forward layer."""

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

    def canonical_cuts(self) -> "Mapping[str, TensorCut]":
        """How ranks divide each canonical tensor, of those that they divide."""
        ...

    def cut_sizes(self) -> "Sequence[CutSize]":
        """The sizes that ranks divide, of all parts of the model."""
        ...


class PlannedModelConfig(TransformerModelConfig, Protocol):
    """The configuration of a model that `mt plan` can count."""

    def layer_costs(self, shape: "RankShape", /) -> "LayerCosts":
        """What one layer costs a rank in one micro-batch; all layers are alike."""
        ...


@runtime_checkable
class DataSection(Protocol):
    """What mt-core reads of the data section."""

    @property
    def seq_length(self) -> int:
        """Tokens in a sample; of an encoder's sequence where there is a decoder's too."""
        ...


@dataclass(frozen=True, slots=True)
class BatchKey:
    """What a model does with one tensor of a batch."""

    argument: str | None
    """Keyword of `Model.losses`; None for a tensor that the model leaves out."""
    required: bool = False
    """Whether the model cannot do without it."""
    per_token: bool = False
    """Whether it is [B, T, …] over the tokens that the loss is of, which context parallelism shards."""


class MetricSum(NamedTuple):
    """A metric of one micro-batch on one rank, to be added up and divided at the end."""

    total: "Tensor"
    weight: "Tensor"


class Losses(NamedTuple):
    """The losses and metrics of one micro-batch on one rank, not reduced.

    A tuple, since FSDP2 looks for tensors in tuples and mappings only.
    """

    tokens: "Tensor | None" = None
    """The loss of each label in nats, [B, T], fp32 or wider; the loss mask decides which count."""
    samples: "Tensor | None" = None
    """The loss of each sample in nats, [B]; the mean over the step's samples is added to that over its tokens."""
    metrics: "Mapping[str, MetricSum]" = MappingProxyType({})
    """By name, what is logged beside the loss, such as an accuracy: Σ total / Σ weight over micro-batches and ranks."""


class Model(Protocol):
    """What `ModelConfig.build` returns, besides being an `nn.Module`.

    Modules with a `core`, an `AttentionCore`, get it replaced for context parallelism and selective recomputation.
    """

    config: Any

    layers: Any
    """Blocks by name."""
    run: Any
    """`run(layers, x)`, which passes x through the layers; recomputation replaces it."""
    batch_keys: "Mapping[str, BatchKey]"
    """The keys of a batch that the model takes; any other is refused."""

    @property
    def losses(self) -> "Callable[..., Losses]":
        """Losses from the arguments that `batch_keys` names.

        Positions are [T] or [B, T], 0, 1, 2, … if not given. Tokens see only those of equal segment ids.
        """
        ...

    def plan(self, tensor: int) -> "Plan":
        """How `tensor` ranks cut the model."""
        ...

    def initial(self, seed: int, name: str) -> "Tensor":
        """The initial value of canonical tensor `name`, whole; it depends on the seed and the name only."""
        ...

    def to_canonical(self, name: str, tensor: "Tensor", rank: int = 0, size: int = 1) -> Iterable[tuple[str, "Tensor"]]:
        """Split a (fused, padded) tensor shaped like parameter `name` on a tensor rank into parts of canonical ones."""
        ...

    def from_canonical(self, name: str, get: "Callable[[str], Any]", rank: int = 0, size: int = 1) -> "Tensor":
        """Fuse a tensor shaped like parameter `name` on a tensor rank from slices of whole canonical ones."""
        ...

    def canonical_regions(self, name: str, rank: int = 0, size: int = 1) -> Mapping[str, tuple[slice, ...]]:
        """Which slices of which canonical tensors parameter `name` holds on a tensor rank; () is all of it."""
        ...


class AttentionCore(Protocol):
    """Kind `attention` has one in a `mt_models.layers.attention_cores.Core`: what mixes positions in attention.

    Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, K head size.
    """

    def __call__(
        self, q_BTHK: "Tensor", k_BSGK: "Tensor", v_BSGK: "Tensor", segment_ids_BS: "Tensor | None" = None, /
    ) -> "Tensor":
        """softmax(q kᵀ / √K + mask) v, y_BTHK: of S keys and T ≤ S queries, query i sits at position S − T + i and sees
        keys up to there, with `segment_ids_BS` only those whose number is that of its own token.

        A core that supports more than causal attention also takes `padding_mask_BS=` and `bias_HTS=`.
        """
        ...


class HasCore(Protocol):
    """A module of a model that mixes positions in an attention core, whatever the module is called.

    The core is replaced for context parallelism and for selective recomputation.
    """

    core: "AttentionCore"


class HasOp(Protocol):
    """A module of a model whose arithmetic is an `op`, which a plan replaces by its parallel implementation."""

    op: "Callable[..., Any]"
    """A function or an object that is called; one with `traceable = False` exchanges in ways that torch.compile cannot
    trace, and runs uncompiled."""


class Dataset(Protocol):
    """Kind `dataset` builds this: samples in training order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Numpy arrays of one sample, of the same keys and shapes for every sample; the keys depend on the kind.

        Data for next-token models give `tokens`, `labels` int64 [T] and `loss_mask` float32 [T]; BERT, T5 and ICT say
        theirs in their datasets.
        """
        ...


class CheckpointLoader(Protocol):
    """Kind `ckpt-loader`: configuration and canonical tensors of a checkpoint in some format.

    Keyword-only parameters of `__init__`, of a saver as well, are options of `mt ckpt convert`.
    A static method `recognises(path: Path) -> bool` lets commands choose the loader where none is named; it looks at
    names of files and imports nothing heavy. A text `looks_for` names those files in errors. Both may be left out.
    """

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
