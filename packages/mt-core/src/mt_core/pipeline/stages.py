"""Which layers each stage has: evenly, with other numbers at the ends, with the ends counted as layers, or as written.

The keys are those of the section `pipeline`; Megatron's rules are in docs/specs/core.md §3.6.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple, NoReturn

from mt_core.config.sections import PipelineConfig
from mt_core.contracts import TransformerModelConfig
from mt_core.errors import MtError, Problem, raise_if
from mt_core.pipeline.actions import Placement
from mt_core.pipeline.layout_string import Stage, format_layout, parse_layout


class Layers(NamedTuple):
    """The layers of a whole model."""

    total: int
    keys: str = "model.layers"
    """The keys of the configuration that add up to it."""


def count_layers(model: TransformerModelConfig) -> Layers:
    """The layers that stages of a model divide, an encoder's before a decoder's."""
    return Layers(model.total_layers, model.layer_keys)


def cut_stages(layers: Layers, placement: Placement, config: PipelineConfig) -> tuple[Stage, ...]:
    """Every stage in the order of the model; `MtError` names all that does not fit, with a layout that does."""
    raise_if(_list_contradictions(config))
    if config.layout is not None:
        stages = parse_layout(config.layout)
        raise_if(_list_layout_problems(stages, layers, placement))
        return stages
    counts = (
        _count_uneven(layers, placement, config)
        if config.num_layers_in_first_stage or config.num_layers_in_last_stage
        else _count_even(layers, placement, config)
    )
    return number_layers(counts)


def number_layers(counts: Sequence[int]) -> tuple[Stage, ...]:
    """Stages of so many layers each; the first has the embedding, the last the loss."""
    bounds = pairwise(accumulate(counts, initial=0))
    last = len(counts) - 1
    return tuple(Stage(range(*bound), number == 0, number == last) for number, bound in enumerate(bounds))


def balance_stages(layers: int, stages: int, *, first: float = 0, last: float = 0) -> tuple[Stage, ...]:
    """Stages that take as equally long as can be, where embedding and head take as long as so many layers.

    Where some have a layer more, those are not the first and the last.
    """
    ends = (0, stages - 1)
    loads = [0.0] * stages
    loads[0] += first
    loads[-1] += last
    counts = [0] * stages
    for _ in range(layers):
        least = min(range(stages), key=lambda number: (loads[number], number in ends))
        counts[least] += 1
        loads[least] += 1
    return number_layers(counts)


def balance_unequal(seconds: Sequence[float], stages: int, *, first: float = 0, last: float = 0) -> tuple[Stage, ...]:
    """Stages of which the longest is as short as can be, by the seconds of each layer, of embedding and of head.

    Of several such cuts it is one whose squares of times add up to little. Layers that take equally long are divided
    as `balance_stages` does.
    """
    if len({*seconds}) == 1:
        return balance_stages(len(seconds), stages, first=first / seconds[0], last=last / seconds[0])
    sums = [*accumulate(seconds, initial=first)]
    best, cuts = [(load, load * load) for load in sums], list[list[int]]()
    for number in range(1, stages):
        more = last if number == stages - 1 else 0.0
        choices = [_cut_best(best[: end + 1], sums, more) for end in range(len(sums))]
        best, starts = [choice[:2] for choice in choices], [start for *_, start in choices]
        cuts.append(starts)
    bounds = [len(seconds)]
    for starts in reversed(cuts):
        bounds.append(starts[bounds[-1]])
    return number_layers([end - start for start, end in pairwise([0, *reversed(bounds)])])


def _cut_best(best: Sequence[tuple[float, float]], sums: Sequence[float], more: float) -> tuple[float, float, int]:
    """Where the last stage before layer `len(best) - 1` begins, with the longest time and the squares of all stages.

    `best` are those of the stages before, by the layer behind them; the last stage takes `more` beside its layers.
    """
    end = sums[len(best) - 1] + more
    shortest = (inf, inf, 0)
    for start in reversed(range(len(best))):
        time = end - sums[start]
        if time > shortest[0]:  # and the longer it is the earlier it begins
            break
        longest, squares = best[start]
        shortest = min(shortest, (max(longest, time), squares + time * time, start))
    return shortest


def _list_contradictions(config: PipelineConfig) -> Iterator[Problem]:
    """Ways to cut that exclude each other."""
    ends = ("num_layers_in_first_stage", "num_layers_in_last_stage")
    counted = ("account_for_embedding", "account_for_loss")
    given = [name for name in (*ends, *counted) if getattr(config, name)]
    if config.layout is not None:
        for name in given:
            yield Problem(f"pipeline.{name}", "is given beside pipeline.layout, which says it all", "leave one out")
    elif any(name in given for name in ends):
        reason = "is given beside numbers of layers in the first or last stage"
        yield from (Problem(f"pipeline.{name}", reason, "leave one out") for name in counted if name in given)


def _count_even(layers: Layers, placement: Placement, config: PipelineConfig) -> list[int]:
    """Equally many for each stage, the ends counted as layers if asked."""
    first, last = int(config.account_for_embedding), int(config.account_for_loss)
    each, rest = divmod(layers.total + first + last, placement.stages)
    counts = [each] * placement.stages
    counts[0] -= first
    counts[-1] -= last
    if rest or min(counts) < 0:
        counted = [name for name, one in (("embedding", first), ("loss", last)) if one]
        reason = f"{' + '.join([f'{layers.total} layers', *counted])} do not divide evenly over {_describe(placement)}"
        _refuse(layers.keys, reason, _list_near(layers, placement.stages, -first - last), layers, placement)
    return counts


def _count_uneven(layers: Layers, placement: Placement, config: PipelineConfig) -> list[int]:
    """Numbers of the first and last rank as given, and evenly many for the ranks between."""
    names = {0: "num_layers_in_first_stage", placement.ranks - 1: "num_layers_in_last_stage"}
    by_rank = {rank: count for rank, name in names.items() if (count := getattr(config, name))}
    for rank, count in by_rank.items():
        if count % placement.chunks:
            reason = f"{count} do not divide by the {placement.chunks} stages of the rank"
            near = f"allowed: multiples of {placement.chunks}"
            _refuse(f"pipeline.{names[rank]}", reason, near, layers, placement)
    others = [rank for rank in range(placement.ranks) if rank not in by_rank]
    fixed, unit = sum(by_rank.values()), len(others) * placement.chunks
    rest = layers.total - fixed
    if rest < 0 or (rest % unit if unit else rest):
        reason = f"{layers.total} layers leave {rest} for the {len(others)} other ranks, which do not divide evenly"
        _refuse(layers.keys, reason, _list_near(layers, unit, fixed), layers, placement)
    by_rank |= {rank: rest // len(others) for rank in others}
    return [by_rank[placement.get_rank(stage)] // placement.chunks for stage in range(placement.stages)]


def _list_near(layers: Layers, unit: int, start: int) -> str:
    """The numbers start, start + unit, … around a number that is none of them."""
    below = max(start + (layers.total - start) // unit * unit, start) if unit else start
    near = [below, below + unit] if unit and below < layers.total else [below]
    return f"allowed: {layers.keys} = {' or '.join(str(number) for number in near if number > 0)}"


def _refuse(where: str, reason: str, allowed: str, layers: Layers, placement: Placement) -> NoReturn:
    near = format_layout(balance_stages(layers.total, placement.stages))
    raise MtError(where, reason, f'{allowed}; or pipeline.layout = "{near}" alone')


def _list_layout_problems(stages: Sequence[Stage], layers: Layers, placement: Placement) -> Iterator[Problem]:
    near = format_layout(balance_stages(layers.total, placement.stages))
    if len(stages) != placement.stages:
        reason = f"{len(stages)} stages, but there are {_describe(placement)}"
        yield Problem("pipeline.layout", reason, f'allowed: {placement.stages} stages, such as "{near}"')
    if (count := stages[-1].layers.stop) != layers.total:
        actual = f"{count} layers (t), but {layers.keys} is {layers.total}"
        yield Problem("pipeline.layout", actual, f'such as "{near}"')


def _describe(placement: Placement) -> str:
    each = f" of {placement.chunks} stages" if placement.chunks > 1 else ""
    return f"{placement.ranks} ranks{each}"
