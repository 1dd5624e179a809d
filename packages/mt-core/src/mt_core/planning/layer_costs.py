"""What a layer costs a rank in one micro-batch: the terms in which a model's configuration answers, and planning asks.

Each part of a model counts its own costs, beside its canonical tensors; those of a block are their sum. A new kind of
layer brings its numbers with it, and nothing here names one.
"""

from dataclasses import dataclass, fields, replace
from operator import add

from mt_core.config.run_config import PlannedRun
from mt_core.config.sections import CPCommType, TokenDispatcherName
from mt_core.parallel.layout import Layout
from mt_core.planning.precision import BYTES


@dataclass(frozen=True, slots=True)
class RankShape:
    """What one rank computes with in a micro-batch, as far as the costs of layers depend on it."""

    tokens: int
    """Tokens of a micro-batch on one context rank."""
    seq_length: int
    """Tokens of a whole sequence."""
    element_size: int
    """Bytes of an activation."""
    tensor: int = 1
    """Ranks that divide the matrices of a layer."""
    sequence_parts: int = 1
    """Tensor ranks that divide the activations between the matrices."""
    context: int = 1
    """Ranks that divide a sequence."""
    cp_comm_type: CPCommType = "ring"
    """How context ranks exchange keys and values."""
    expert: int = 1
    """Ranks that divide the experts."""
    expert_tensor: int = 1
    """Tensor ranks that share each expert."""
    token_dispatcher: TokenDispatcherName = "all_to_all"
    """How expert ranks exchange tokens."""
    compiled: bool = False
    """Whether torch.compile joins the kernels of a block."""

    @property
    def wide_size(self) -> int:
        """Bytes of an element in fp32, or wider where activations are."""
        return max(4, self.element_size)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor that autograd saves for the backward pass of one layer and one micro-batch."""

    name: str
    size: float
    """Bytes on this rank."""
    core: bool = False
    """Whether it is saved inside the attention core, which selective recompute runs again."""


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """Costs of a layer, or of one part of it, on one rank for one micro-batch; costs of parts add up."""

    saved: tuple[SavedTensor, ...] = ()
    """What autograd saves without recompute."""
    gradient_bytes: float = 0
    """Bytes of gradients of hidden features that exist at once in the backward pass."""
    forward_bytes: float = 0
    """Bytes read and written in the forward pass by kernels that are neither matrix products nor the attention core."""
    backward_bytes: float = 0
    """Bytes that such kernels read and write in the backward pass."""
    tensor_reductions: float = 0
    """Results of which each tensor rank has a summand, such as those of output projections."""
    repeated_flops: float = 0
    """Training FLOPs of a token that ranks compute beyond their share: weights that are whole on each, and padding."""
    kv_bytes: float = 0
    """Bytes of keys and values, which context ranks exchange."""
    query_bytes: float = 0
    """Bytes of queries and of the attention core's results, which context ranks exchange by all-to-all."""
    routed_bytes: float = 0
    """Bytes of the rows that go to experts, and come back from them: each token once for each of its experts."""
    mixed_bytes: float = 0
    """Bytes of the tokens that pass through experts."""

    def __add__(self, other: "LayerCosts") -> "LayerCosts":
        return LayerCosts(*(add(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)))

    def scale(self, share: float) -> "LayerCosts":
        """The costs of a layer that only this share of the layers have, as a part of an average layer's."""
        saved = tuple(replace(tensor, size=tensor.size * share) for tensor in self.saved)
        rest = {f.name: getattr(self, f.name) * share for f in fields(self) if f.name != "saved"}
        return LayerCosts(saved, **rest)


def get_layer_costs(config: PlannedRun, layout: Layout) -> LayerCosts:
    """The costs of one of a model's layers, in the configuration of a run and under a layout."""
    return config.model.layer_costs(
        RankShape(
            tokens=count_tokens(config, layout),
            seq_length=config.data.seq_length,
            element_size=BYTES[config.precision.dtype],
            tensor=layout.dims.tensor,
            sequence_parts=layout.sequence_parts,
            context=layout.dims.context,
            cp_comm_type=layout.cp_comm_type,
            expert=layout.dims.expert,
            expert_tensor=layout.dims.expert_tensor,
            token_dispatcher=layout.token_dispatcher,
            compiled=config.runtime.compile,
        )
    )


def count_tokens(config: PlannedRun, layout: Layout) -> int:
    """Tokens of one micro-batch on one context rank."""
    return layout.micro_batch * config.data.seq_length // layout.dims.context
