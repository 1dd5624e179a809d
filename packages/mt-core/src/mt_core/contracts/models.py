"""What a model offers to training: its inputs, its losses, its blocks, and its canonical tensors."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from mt_core.contracts.configurations import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from mt_core.parallel.tensor.plan import Plan
    from mt_core.pipeline.layout_string import Stage


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
    tokens_name: str | None = None
    """Name under which the mean loss of the labels that count is logged beside the loss; None to log it not."""
    samples_name: str | None = None
    """Name under which the mean loss of the samples is logged."""


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


class Blocks(Protocol):
    """What mt-core asks of a model's blocks; an `nn.ModuleDict` offers it."""

    def values(self) -> "Iterable[nn.Module]":
        """Every block, in the order of the forward pass."""
        ...


class CanonicalModel(Protocol):
    """A module whose parameters can be converted from and to the canonical tensors of checkpoints."""

    @property
    def config(self) -> ModelConfig:
        """The configuration that built it."""
        ...

    def named_parameters(self) -> "Iterator[tuple[str, nn.Parameter]]":
        """Every parameter and its name, as `nn.Module` gives them."""
        ...

    def to_canonical(
        self, name: str, tensor: "Tensor", rank: int = 0, size: int = 1, inner: int = 1
    ) -> Iterable[tuple[str, "Tensor"]]:
        """Split a (fused, padded) tensor shaped like parameter `name` on a rank into parts of canonical ones.

        It is rank `rank` of `size` that divide the parameter; where those are `inner` tensor ranks for each expert
        rank, tensor ranks are neighbours.
        """
        ...

    def from_canonical(
        self, name: str, get: "Callable[[str], Any]", rank: int = 0, size: int = 1, inner: int = 1
    ) -> "Tensor":
        """Fuse a tensor shaped like parameter `name` on a rank from slices of whole canonical ones."""
        ...

    def canonical_regions(
        self, name: str, rank: int = 0, size: int = 1, inner: int = 1
    ) -> Mapping[str, tuple[slice, ...]]:
        """Which slices of which canonical tensors parameter `name` holds on a rank; () is all of it."""
        ...


class Model(CanonicalModel, Protocol):
    """The `nn.Module` that `ModelConfig.build` returns, with what mt-core asks of it.

    Modules with a `core`, an `AttentionCore`, get it replaced for context parallelism and selective recomputation.
    """

    @property
    def layers(self) -> "Blocks":
        """Blocks by name, those of an encoder before those of a decoder."""
        ...

    run: "Callable[[list[Callable[[Tensor], Tensor]], Tensor], Tensor]"
    """`run(layers, x)`, which passes x through the layers; recomputation replaces it."""

    @property
    def batch_keys(self) -> "Mapping[str, BatchKey]":
        """The keys of a batch that the model takes; any other is refused."""
        ...

    def modules(self) -> "Iterator[nn.Module]":
        """Every module in it, as `nn.Module` gives them."""
        ...

    def parameters(self) -> "Iterator[nn.Parameter]":
        """Every parameter, as `nn.Module` gives them."""
        ...

    def train(self, mode: bool = True) -> Self:
        """Switch to training, or to evaluation."""
        ...

    def eval(self) -> Self:
        """Switch to evaluation."""
        ...

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


class EdgeTensor(NamedTuple):
    """A tensor that a stage of a pipeline passes on to the next one, for one micro-batch."""

    shape: tuple[int, ...]
    dtype: "dtype"
    per_token: bool = True
    """Whether dim 1 runs over tokens, of which a tensor rank has a part under sequence parallelism."""


class StageOutput(NamedTuple):
    """What a stage makes of a micro-batch."""

    edge: "Mapping[str, Tensor]"
    """What the next stage gets, by name; nothing from the last."""
    losses: Losses
    """Losses of the last stage, and metrics of any."""


class StagedModel(Model, Protocol):
    """A model that can be cut into stages of a pipeline, as every one is whose configuration has `total_layers`.

    A rank may have several stages; its module keeps the names of the whole model.
    """

    def keep_stages(self, stages: "Sequence[Stage]") -> None:
        """Drop every part that none of these stages has."""
        ...

    def edge_tensors(
        self, stage: "Stage", arguments: "Mapping[str, Tensor]", dtype: "dtype"
    ) -> Mapping[str, EdgeTensor]:
        """The tensors that a stage passes on, by name, of a micro-batch with these arguments of `losses` in a model of
        this data type; all are floating-point numbers, and have gradients."""
        ...

    @property
    def run_stage(self) -> "Callable[..., StageOutput]":
        """`run_stage(stage, edge, **arguments)` passes a micro-batch through one stage.

        `edge` is what the stage before it passed on, and the arguments are those of `losses`: every stage gets them.
        """
        ...


def as_module(model: "CanonicalModel") -> "nn.Module":
    """Return the model as the `nn.Module` that it is, for functions of torch."""
    from torch import nn

    assert isinstance(model, nn.Module)
    return model


class AttentionCore(Protocol):
    """Kind `attention` has one in a `mt_models.layers.attention_cores.Core`: what mixes positions in attention.

    Shape suffixes: B batch, T queries, S keys, H = G·R query heads, G key/value groups, K head size.
    """

    def __call__(
        self, q_BTHK: "Tensor", k_BSGK: "Tensor", v_BSGK: "Tensor", segment_ids_BS: "Tensor | None" = None, /
    ) -> "Tensor":
        """softmax(q kᵀ / √K + mask) v, y_BTHK: of S keys and T ≤ S queries, query i sits at position S − T + i and sees
        keys up to there, with `segment_ids_BS` only those whose number is that of its own token.

        A core that supports more than causal attention also takes `padding_mask_BS=` and `bias_HTS=`, one that supports
        dropout `dropout=`, a `mt_core.parallel.dropout.ProbabilityDropout`, with which it passes its probabilities
        through `drop_probabilities`; such a core gets it in training where the model drops any.
        """
        ...
