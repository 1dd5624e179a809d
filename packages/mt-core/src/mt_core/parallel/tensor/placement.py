"""`apply_plan`, which carries out a plan, and `Placement`, which says how it left each parameter.

A module that a rule touches keeps its code. Its parameters are replaced by this rank's part of them, and its `op` by
the parallel implementation. A cut without one is refused: nothing would put the parts of the result together.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from torch import nn

from mt_core.config.sections import TokenDispatcherName
from mt_core.distributed.mesh import Axis, make_subaxis
from mt_core.errors import Problem, raise_if
from mt_core.parallel.tensor.plan import (
    NO_EXPERTS,
    PARALLEL_OPS,
    Column,
    Expert,
    Heads,
    Plan,
    PlanRanks,
    Replicate,
    Row,
    Rule,
    Vocab,
    find_parallel_op,
    get_cut_axis,
    get_cut_dim,
)


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
    inner: int = 1
    """Neighbours on the axis that cuts that have parts of the same experts."""


def apply_plan(
    model: nn.Module,
    plan: Plan,
    axis: Axis,
    *,
    sequence: bool = False,
    expert: Axis = NO_EXPERTS,
    expert_parts: Axis | None = None,
    token_dispatcher: TokenDispatcherName = "all_to_all",
) -> dict[str, Placement]:
    """Cut a model, built on meta, for this rank of the tensor axis `axis` and of the expert axis; return the placement
    of each parameter. All that does not fit is one `MtError`.

    `expert_parts` are the ranks of both axes, if tensor ranks share each expert; unset, they have whole ones.
    """
    ranks = PlanRanks(axis, sequence, expert, expert_parts or expert, token_dispatcher)
    named = dict(model.named_modules())
    matches = {name: [rule for pattern, rule in plan.items() if fnmatchcase(name, pattern)] for name in named}
    modules = {name: m for name, m in named.items() if matches[name] or [*m.parameters(recurse=False)]}
    rules = {name: matches[name] for name in modules}
    raise_if(_problems(modules, plan, rules, ranks))
    neighbours = cache(lambda size: make_subaxis(axis, size))
    placements: dict[str, Placement] = {}
    for name, module in modules.items():
        (rule,) = rules[name]
        cut = ranks.get_axis(rule)
        if cut.size > 1 and (parallel_op := find_parallel_op(rule, module)):
            module.op = parallel_op(ranks)
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(rule, Expert):
                _cut_experts(parameter, rule, ranks)
                placement = _place_experts(ranks)
            else:
                _cut(parameter, get_cut_dim(rule, leaf), axis.rank, axis.size)
                placement = _place(parameter, leaf, rule, axis, neighbours, sequence=sequence)
            placements[f"{name}.{leaf}"] = placement
    return placements


def _problems(
    modules: Mapping[str, nn.Module], plan: Plan, rules: Mapping[str, list[Rule]], ranks: PlanRanks
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
            yield from _dim_problems(f"{name}.{leaf}", parameter, rules[name], ranks)
    for name, module in modules.items():
        yield from _op_problems(name, module, rules[name], ranks)


def _dim_problems(name: str, parameter: nn.Parameter, rules: list[Rule], ranks: PlanRanks) -> Iterator[Problem]:
    sizes = {"tensor": ranks.tensor.size, "expert": ranks.expert.size}
    for dim, axis in {(get_cut_dim(rule, name.rpartition(".")[2]), get_cut_axis(rule)) for rule in rules}:
        if dim is not None and (length := parameter.shape[dim]) % (size := sizes[axis]):
            yield Problem(name, f"dim {dim} is {length}", f"multiples of parallel.{axis} = {size}")
    for rule in rules:
        if isinstance(rule, Expert) and ranks.expert_tensor > 1:
            yield from _inner_problems(name, parameter, rule, ranks.expert_tensor)


def _inner_problems(name: str, parameter: nn.Parameter, rule: Expert, size: int) -> Iterator[Problem]:
    """Why tensor ranks cannot share each expert of a stack."""
    if rule.inner_dim is None:
        actual = f"its Expert has no inner_dim for the {size} tensor ranks that share each expert"
        yield Problem(f"plan of {name!r}", actual, "give it one, or set parallel.expert_tensor = 1")
    elif (length := parameter.shape[rule.inner_dim]) % size:
        actual = f"dim {rule.inner_dim} is {length}"
        yield Problem(name, actual, f"multiples of parallel.expert_tensor = {size}, or parallel.expert_tensor = 1")


def _op_problems(name: str, module: nn.Module, rules: list[Rule], ranks: PlanRanks) -> Iterator[Problem]:
    """A cut that no parallel implementation follows, which would give wrong results without an error."""
    for rule in rules:
        cuts = isinstance(rule, Column | Row | Vocab | Expert) and ranks.get_axis(rule).size > 1
        if not cuts or find_parallel_op(rule, module) is not None:
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


def _cut(parameter: nn.Parameter, dim: int | None, rank: int, size: int) -> None:
    """Keep a rank's part; the parameter stays the same object, so that ties survive."""
    if dim is not None and size > 1:
        parameter.data = parameter.data.chunk(size, dim)[rank].clone()


def _cut_experts(parameter: nn.Parameter, rule: Expert, ranks: PlanRanks) -> None:
    """Keep this rank's experts, and its part of each if tensor ranks share them."""
    _cut(parameter, 0, ranks.expert.rank, ranks.expert.size)
    if ranks.expert_tensor > 1:
        _cut(parameter, rule.inner_dim, ranks.tensor.rank, ranks.tensor.size)


def _place_experts(ranks: PlanRanks) -> Placement:
    if ranks.expert_tensor > 1:
        return Placement(0, ranks.expert_parts, inner=ranks.expert_tensor)
    partial = ranks.sequence and ranks.tensor.size > 1
    return Placement(0, ranks.expert_parts, replicas=ranks.tensor, partial=partial)


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
    if dim is None:
        shared = isinstance(rule, Heads) or (sequence and not isinstance(rule, Replicate))
        return Placement(dim, replicas=axis, partial=shared and axis.size > 1)
    if isinstance(rule, Column) and rule.kv_replicas > 1:
        unique = parameter.shape[1] - rule.num_replicated
        replicated_from = parameter.numel() // parameter.shape[1] * unique
        return Placement(dim, axis, neighbours(rule.kv_replicas), replicated_from, partial=True)
    return Placement(dim, axis)
