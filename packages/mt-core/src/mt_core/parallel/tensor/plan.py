"""How tensor and expert parallelism cut a model: rules by module name, and `apply_plan`, which carries them out.

A module that a rule touches keeps its code. Its parameters are replaced by this rank's part of them, and its `op`, the
plain function that does its arithmetic, by the parallel implementation that `PARALLEL_OPS` has for it. A cut without
one is refused: nothing would put the parts of the result together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import nn

from mt_core.config.sections import TokenDispatcherName
from mt_core.distributed.mesh import Axis, make_subaxis
from mt_core.errors import Problem, raise_if
from mt_core.parallel.dropout import LocalHeads, SequenceDropout, drop_features, jitter_features, number_heads
from mt_core.parallel.expert.dispatcher import DISPATCHERS, dispatch
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, linear_cross_entropy
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

    It is whole on the tensor ranks that share these experts, as under `Sequence`.
    """


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
    token_dispatcher: TokenDispatcherName = "all_to_all"

    def get_axis(self, rule: Rule) -> Axis:
        """Return the axis over which a rule cuts."""
        return self.expert if isinstance(rule, Expert) else self.tensor


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
    (Sequence, jitter_features): lambda ranks: SequenceDropout(ranks.tensor, ranks.sequence, jitter_features),
    (Column, share_features): _over_tensor(SharedFeatures),
    (Column, number_heads): lambda ranks: LocalHeads(ranks.tensor),
    # with sequence parallelism each rank sends its tokens
    (Expert, dispatch): lambda ranks: DISPATCHERS[ranks.token_dispatcher](ranks.expert),
    (Vocab, used_elsewhere): lambda _: used_elsewhere,
    (Expert, used_elsewhere): lambda _: used_elsewhere,
}
"""What makes the parallel implementation of a module's `op` under a rule."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How one parameter is cut over the ranks, and which elements several ranks hold."""

    dim: int | None = None
    """The dim that is cut; None for a whole parameter."""
    axis: Axis = Axis("tensor")
    """The axis that the parameter is cut over, if it is."""
    replicas: Axis = Axis("tensor")
    """Ranks that hold equal values in the elements from `replicated_from` on."""
    replicated_from: int = 0
    """The first element that other ranks hold as well, counted flat."""
    partial: bool = False
    """Whether the gradients of those replicas are parts of a sum."""
    tied: Axis = Axis("tied")
    """Ranks of the pipeline that have the parameter too, for another use, and a part of its gradient each."""


def apply_plan(
    model: nn.Module,
    plan: Plan,
    axis: Axis,
    *,
    sequence: bool = False,
    expert: Axis = NO_EXPERTS,
    token_dispatcher: TokenDispatcherName = "all_to_all",
) -> dict[str, Placement]:
    """Cut a model, built on meta, for this rank of the tensor axis `axis` and of the expert axis; return the placement
    of each parameter. All that does not fit is one `MtError`."""
    ranks = PlanRanks(axis, sequence, expert, token_dispatcher)
    named = dict(model.named_modules())
    matches = {name: [rule for pattern, rule in plan.items() if fnmatchcase(name, pattern)] for name in named}
    modules = {name: m for name, m in named.items() if matches[name] or [*m.parameters(recurse=False)]}
    rules = {name: matches[name] for name in modules}
    raise_if(_problems(modules, plan, rules, {"tensor": axis.size, "expert": expert.size}))
    neighbours = cache(lambda size: make_subaxis(axis, size))
    placements: dict[str, Placement] = {}
    for name, module in modules.items():
        (rule,) = rules[name]
        cut = ranks.get_axis(rule)
        if cut.size > 1 and (parallel_op := _find_parallel_op(rule, module)):
            module.op = parallel_op(ranks)
        for leaf, parameter in module.named_parameters(recurse=False):
            _cut(parameter, get_cut_dim(rule, leaf), cut)
            placement = _place(parameter, leaf, rule, axis, neighbours, sequence=sequence)
            placements[f"{name}.{leaf}"] = replace(placement, axis=expert) if isinstance(rule, Expert) else placement
    return placements


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


def _find_parallel_op(rule: Rule, module: nn.Module) -> Callable[[PlanRanks], Any] | None:
    op = getattr(module, "op", None)
    return next((make for (kind, plain), make in PARALLEL_OPS.items() if kind is type(rule) and plain == op), None)


def _problems(
    modules: Mapping[str, nn.Module], plan: Plan, rules: Mapping[str, list[Rule]], sizes: Mapping[str, int]
) -> Iterator[Problem]:
    for name, matching in rules.items():
        if len(matching) != 1:
            yield Problem(
                f"plan of {name!r}", f"{len(matching)} rules match: {matching}", "exactly one rule for each module"
            )
    for pattern in plan:
        if not any(fnmatchcase(name, pattern) for name in modules):
            yield Problem(f"plan rule {pattern!r}", "matches no module", "rules for modules of this model")
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False):
            for dim, axis in {(get_cut_dim(rule, leaf), get_cut_axis(rule)) for rule in rules[name]}:
                if dim is not None and (length := parameter.shape[dim]) % (size := sizes[axis]):
                    yield Problem(f"{name}.{leaf}", f"dim {dim} is {length}", f"multiples of parallel.{axis} = {size}")
    for name, module in modules.items():
        yield from _op_problems(name, module, rules[name], sizes)


def _op_problems(name: str, module: nn.Module, rules: list[Rule], sizes: Mapping[str, int]) -> Iterator[Problem]:
    """A cut that no parallel implementation follows, which would give wrong results without an error."""
    for rule in rules:
        cuts = isinstance(rule, Column | Row | Vocab | Expert) and sizes[get_cut_axis(rule)] > 1
        if not cuts or _find_parallel_op(rule, module) is not None:
            continue
        kind, op = type(rule).__name__, getattr(module, "op", None)
        reason = "the module has no op" if op is None else f"its op {_op_name(op)} has no parallel implementation"
        known = ", ".join(_op_name(plain) for rule_type, plain in PARALLEL_OPS if rule_type is type(rule))
        yield Problem(
            f"plan of {name!r}",
            f"{kind} cuts the module, but {reason}",
            f"ops allowed under {kind}: {known}; or leave the module whole with Replicate",
        )


def _op_name(op: Any) -> str:
    return getattr(op, "__name__", type(op).__name__)


def _cut(parameter: nn.Parameter, dim: int | None, axis: Axis) -> None:
    """Keep this rank's part; the parameter stays the same object, so that ties survive."""
    if dim is not None and axis.size > 1:
        parameter.data = parameter.data.chunk(axis.size, dim)[axis.rank].clone()


def _place(
    parameter: nn.Parameter,
    leaf: str,
    rule: Rule,
    axis: Axis,
    neighbours: Callable[[int], Axis],
    *,
    sequence: bool,
) -> Placement:
    dim = get_cut_dim(rule, leaf)
    if dim is None or isinstance(rule, Expert):
        shared = isinstance(rule, Heads) or (sequence and not isinstance(rule, Replicate))
        return Placement(dim, replicas=axis, partial=shared and axis.size > 1)
    if isinstance(rule, Column) and rule.kv_replicas > 1:
        unique = parameter.shape[1] - rule.num_replicated
        replicated_from = parameter.numel() // parameter.shape[1] * unique
        return Placement(dim, axis, neighbours(rule.kv_replicas), replicated_from, partial=True)
    return Placement(dim, axis)
