"""How tensor and expert parallelism cut a model: rules by module name, and what implements each.

`PARALLEL_OPS` has, for a rule and the plain function that does a module's arithmetic, its parallel implementation;
`mt_core.parallel.tensor.placement` carries a plan out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import nn

from mt_core.config.sections import TokenDispatcherName
from mt_core.distributed.mesh import Axis
from mt_core.parallel.dropout import LocalHeads, SequenceDropout, drop_features, jitter_features, number_heads
from mt_core.parallel.expert.dispatcher import DISPATCHERS, TensorDispatcher, TokenDispatcher, dispatch
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, linear_cross_entropy
from mt_core.parallel.tensor.first_token import SharedFirstToken, take_first_token
from mt_core.parallel.tensor.linear import (
    ColumnEmbedding,
    ColumnLinear,
    RowLinear,
    SequenceEmbedding,
    VocabEmbedding,
    VocabLinear,
)
from mt_core.parallel.tensor.shared_features import SharedFeatures, share_features


@dataclass(frozen=True, slots=True)
class Column:
    """Weight and bias are cut along `dim`, one of the outputs."""

    dim: int
    kv_replicas: int = 1
    """Neighbouring ranks that hold equal values in the last `num_replicated` entries of dim 1: K/V heads."""
    num_replicated: int = 0
    """Entries of dim 1 that neighbours repeat."""


@dataclass(frozen=True, slots=True)
class Row:
    """The weight is cut along `dim`, one of the inputs; a bias is whole on every rank."""

    dim: int


@dataclass(frozen=True, slots=True)
class Vocab:
    """The weight is cut along its rows, one for each id; or a loss over such rows."""


@dataclass(frozen=True, slots=True)
class Replicate:
    """Whole on every rank and used on the same activations everywhere."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """Whole on every rank; under sequence parallelism used on a part of the sequence, so its gradients are summed."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Whole on every rank and used on this rank's heads only, so its gradients are always summed."""


@dataclass(frozen=True, slots=True)
class Expert:
    """A stack with an entry for each expert, cut along dim 0 over the expert axis; or what sends tokens to them.

    Where tensor ranks have whole experts, it is whole on them as under `Sequence`; otherwise they divide `inner_dim`.
    """

    inner_dim: int | None = None


Rule = Column | Row | Vocab | Replicate | Sequence | Heads | Expert
Plan = Mapping[str, Rule]
"""Patterns of module names (`fnmatch`), each with a rule; every module with parameters matches exactly one."""


def used_elsewhere() -> None:
    """The `op` of a module that only stores weights, such as the rows of an output head: another module's op computes
    with them, and that one has the parallel implementation."""


NO_EXPERTS = Axis("expert")
"""The expert axis of a run that cuts no experts."""


@dataclass(frozen=True, slots=True)
class PlanRanks:
    """The ranks that a plan cuts a model over, and how they exchange."""

    tensor: Axis
    sequence: bool = False
    """Sequence parallelism over the tensor axis."""
    expert: Axis = NO_EXPERTS
    expert_parts: Axis = NO_EXPERTS
    """Ranks that hold different parts of the experts: those of `expert`, times those of `tensor` that share each."""
    token_dispatcher: TokenDispatcherName = "all_to_all"

    @property
    def expert_tensor(self) -> int:
        """Tensor ranks that share each expert."""
        return self.expert_parts.size // self.expert.size

    def get_axis(self, rule: Rule) -> Axis:
        """Return the axis over which a rule cuts."""
        return self.expert_parts if isinstance(rule, Expert) else self.tensor

    def make_dispatcher(self) -> TokenDispatcher:
        """Make what carries tokens to experts; with sequence parallelism and whole experts each rank sends its own."""
        over_experts = DISPATCHERS[self.token_dispatcher](self.expert) if self.expert.size > 1 else dispatch
        return over_experts if self.expert_tensor == 1 else TensorDispatcher(self.tensor, self.sequence, over_experts)


def _over_tensor(make: Callable[[Axis, bool], Any]) -> Callable[[PlanRanks], Any]:
    return lambda ranks: make(ranks.tensor, ranks.sequence)


PARALLEL_OPS: Mapping[tuple[type, Any], Callable[[PlanRanks], Any]] = {
    (Column, F.linear): _over_tensor(ColumnLinear),
    (Column, F.embedding): _over_tensor(ColumnEmbedding),
    (Row, F.linear): _over_tensor(RowLinear),
    (Vocab, F.linear): _over_tensor(VocabLinear),
    (Vocab, F.embedding): _over_tensor(VocabEmbedding),
    (Vocab, linear_cross_entropy): _over_tensor(VocabCrossEntropy),
    (Sequence, F.embedding): _over_tensor(SequenceEmbedding),
    (Sequence, drop_features): _over_tensor(SequenceDropout),
    (Sequence, take_first_token): _over_tensor(SharedFirstToken),
    (Sequence, jitter_features): lambda ranks: SequenceDropout(ranks.tensor, ranks.sequence, jitter_features),
    (Column, share_features): _over_tensor(SharedFeatures),
    (Column, number_heads): lambda ranks: LocalHeads(ranks.tensor),
    (Expert, dispatch): PlanRanks.make_dispatcher,
    (Vocab, used_elsewhere): lambda _: used_elsewhere,
    (Expert, used_elsewhere): lambda _: used_elsewhere,
}
"""What makes the parallel implementation of a module's `op` under a rule."""


def get_cut_dim(rule: Rule, leaf: str) -> int | None:
    """Return the dim along which a rule cuts a module's `weight` or `bias`."""
    match rule, leaf:
        case Column(dim), _:
            return dim
        case Row(dim), "weight":
            return dim
        case Vocab() | Expert(), _:
            return 0
    return None


def get_cut_axis(rule: Rule) -> str:
    """Return the name of the axis over which a rule cuts."""
    return "expert" if isinstance(rule, Expert) else "tensor"


def find_parallel_op(rule: Rule, module: nn.Module) -> Callable[[PlanRanks], Any] | None:
    """Return what makes the parallel implementation of a module under a rule; None if there is none."""
    op = getattr(module, "op", None)
    return next((make for (kind, plain), make in PARALLEL_OPS.items() if kind is type(rule) and plain == op), None)
