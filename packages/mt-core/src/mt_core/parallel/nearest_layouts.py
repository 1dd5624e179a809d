"""Which layouts come nearest to one that does not pass."""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd, log2

from mt_core.config.run_config import TransformerRun
from mt_core.distributed.topology import ParallelDims
from mt_core.errors import Problem
from mt_core.parallel.layout import Layout, axis_problems, build_layout


def find_nearest(config: TransformerRun, ranks: int, *, count: int = 3) -> list[Layout]:
    """Up to `count` layouts of `ranks` that pass, those with the least change of tensor, context and data first.

    Sequence parallelism is given up where tensor is 1, a shard_size that no longer divides, and of the expert axis what
    does not.
    """
    wanted = build_layout(config, ranks)
    legal = [layout for layout in cuts(wanted, ranks // wanted.dims.pipeline) if not any(axis_problems(config, layout))]
    return sorted(legal, key=lambda layout: _distance(layout.dims, wanted.dims))[:count]


def cuts(layout: Layout, ranks: int) -> Iterator[Layout]:
    """`layout` with every tensor × context × data = `ranks`, those of one stage, whatever the rules say."""
    for tensor in range(1, ranks + 1):
        for context in range(1, ranks // tensor + 1):
            if ranks % (tensor * context) == 0:
                yield recut(layout, tensor=tensor, context=context, data=ranks // tensor // context)


def recut(layout: Layout, *, tensor: int, context: int, data: int) -> Layout:
    """`layout` with other axes; what no longer makes sense with them is dropped."""
    shard, expert = layout.dims.shard, gcd(layout.dims.expert, data * context)
    shard = shard if shard and data * context % shard == 0 else None
    whole = layout.expert_tensor == 1 < tensor
    dims = ParallelDims(data, context, tensor, shard, expert, layout.dims.pipeline, whole)
    expert_tensor = layout.expert_tensor if layout.expert_tensor in (None, 1) else tensor
    return replace(layout, dims=dims, sequence=layout.sequence and tensor > 1, expert_tensor=expert_tensor)


def _distance(one: ParallelDims, other: ParallelDims) -> tuple[float, int, int]:
    """Doublings and halvings between two, and, between equals, rather less context and then less tensor."""
    pairs = ((one.tensor, other.tensor), (one.context, other.context), (one.data, other.data))
    return sum(abs(log2(a / b)) for a, b in pairs), one.context, one.tensor


def suggest_nearest(config: TransformerRun, ranks: int) -> Problem:
    """What to do instead, as the last line of a refusal."""
    actual = f"this layout cannot run on {ranks} ranks"
    if layouts := find_nearest(config, ranks):
        return Problem("parallel", actual, f"nearest that pass: {'; '.join(map(describe, layouts))}")
    others = [
        n for n in (*range(ranks - 1, 0, -1), *range(ranks + 1, 2 * ranks + 1)) if find_nearest(config, n, count=1)
    ]
    below, above = (max((n for n in others if n < ranks), default=0), min((n for n in others if n > ranks), default=0))
    passing = (f"with {n} ranks: {describe(find_nearest(config, n, count=1)[0])}" for n in (below, above) if n)
    return Problem("parallel", actual, f"no layout of {ranks} passes; {'; '.join(passing) or 'nor one of fewer'}")


def describe(layout: Layout) -> str:
    """The axes in words."""
    dims, sequence = layout.dims, " + sequence" if layout.sequence else ""
    expert = f", expert {dims.expert}" if dims.expert > 1 else ""
    whole = ", whole experts" if dims.whole_experts else ""
    return f"tensor {dims.tensor}{sequence} × context {dims.context} × data {dims.data}{expert}{whole}"
