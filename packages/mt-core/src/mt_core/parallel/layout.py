"""How a run is cut over ranks, and the rules that say which cuts are possible.

The same rules serve `mt plan` and `mt train`; `mt_core.parallel.nearest_layouts` lists layouts that pass.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import gcd, lcm
from typing import cast

from mt_core.config.run_config import RunConfig, TransformerRun
from mt_core.config.sections import CPCommType, TokenDispatcherName
from mt_core.contracts import TransformerModelConfig
from mt_core.distributed.topology import ParallelDims, find_expert_tensor_problem
from mt_core.errors import MtError, Problem
from mt_core.parallel.cuts import CutSize
from mt_core.pipeline.layout_string import format_layout
from mt_core.pipeline.schedule_table import get_placement, get_size, list_chunk_problems, list_problems
from mt_core.pipeline.stages import balance_stages, count_layers, cut_stages


@dataclass(frozen=True, slots=True)
class Recompute:
    """Activations that are computed again; the fields of `RecomputeConfig`."""

    granularity: str = "none"
    method: str = "uniform"
    layers: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything in a configuration that changes where things lie, but not what is trained."""

    dims: ParallelDims
    sequence: bool = False
    cp_comm_type: CPCommType = "ring"
    expert_tensor: int | None = None
    """Tensor ranks that share each expert, if the configuration says so."""
    token_dispatcher: TokenDispatcherName = "all_to_all"
    sharding: str = "replicate"
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    bucket_size: int = 40_000_000
    micro_batch: int = 1
    recompute: Recompute = Recompute()

    @property
    def shard_group_size(self) -> int:
        """Ranks that share one copy of the sharded state."""
        return self.dims.shard_group_size

    @property
    def replicas(self) -> int:
        """Copies of the sharded state."""
        return self.dims.sizes["replica"]

    @property
    def sequence_parts(self) -> int:
        """Tensor ranks among which activations between the matrices are cut."""
        return self.dims.tensor if self.sequence else 1


def build_layout(config: RunConfig, ranks: int | None = None) -> Layout:
    """The layout that a `RunConfig` asks for.

    The data axis, if unset, is what the others leave of `ranks`; without those, as short as what is shared allows.
    """
    parallel, recompute = config.parallel, config.recompute
    shard = 1 if parallel.sharding == "replicate" else parallel.shard_size
    least = lcm(parallel.context, parallel.expert, shard or 1) // parallel.context
    model = parallel.tensor * parallel.context * parallel.pipeline
    data = parallel.data or (least if ranks is None else max(ranks // model, 1))
    return Layout(
        dims=ParallelDims(
            data,
            parallel.context,
            parallel.tensor,
            shard,
            parallel.expert,
            parallel.pipeline,
            parallel.expert_tensor == 1 < parallel.tensor,
        ),
        sequence=parallel.sequence,
        cp_comm_type=parallel.cp_comm_type,
        expert_tensor=parallel.expert_tensor,
        token_dispatcher=parallel.token_dispatcher,
        sharding=parallel.sharding,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.bucket_size,
        micro_batch=config.batch.micro_batch,
        recompute=Recompute(recompute.granularity, recompute.method, recompute.layers),
    )


def problems(config: TransformerRun, ranks: int | None = None) -> Iterator[Problem]:
    """Everything that keeps a run from being cut as its configuration says; without `ranks`, as far as that shows."""
    layout = build_layout(config, ranks)
    dims, parallel = layout.dims, config.parallel
    if ranks is not None and dims.ranks != ranks:
        data = f" × data {dims.data}" if parallel.data else ""
        data += f" × pipeline {dims.pipeline}" if dims.pipeline > 1 else ""
        product = "tensor × context × data" + (" × pipeline" if dims.pipeline > 1 else "")
        yield Problem(
            "parallel",
            f"tensor {dims.tensor} × context {dims.context}{data} does not make {ranks} ranks",
            f"allowed: {product} = {ranks}",
        )
    yield from pipeline_problems(config, layout if ranks or parallel.data else None)
    yield from axis_problems(config, layout)
    if parallel.expert == 1 and parallel.token_dispatcher != "all_to_all":
        actual = f'"{parallel.token_dispatcher}", but parallel.expert is 1, and no token travels'
        yield Problem("parallel.token_dispatcher", actual, "leave it out, or set parallel.expert above 1")
    yield from _expert_tensor_key(config)
    yield from _shard(config, layout)
    recompute, layers = config.recompute, config.model.layers
    if recompute.granularity == "full" and recompute.layers > layers:
        yield Problem("recompute.layers", f"{recompute.layers} of {layers} layers", f"allowed: 1 to {layers}")


def pipeline_problems(config: RunConfig, layout: Layout | None = None) -> Iterator[Problem]:
    """What keeps a pipeline from running, or has no effect; without a layout, as far as that shows.

    `mt plan` cuts the pipeline first, and asks about one of its stages.
    """
    if config.parallel.pipeline > 1:
        wrong = list(stage_problems(config))
        yield from wrong
        unit, batch = (layout.micro_batch * layout.dims.data, config.batch) if layout else (0, config.batch)
        if not wrong and unit and batch.global_batch % unit == 0 and not batch.sizes:
            size = get_size(config, batch.global_batch // unit)
            yield from list_problems(config.pipeline.schedule, size, samples=unit)
        return
    for key, field in type(config.pipeline).model_fields.items():
        if (value := getattr(config.pipeline, key)) != field.default:
            actual = f"{value!r}, but parallel.pipeline is 1"
            yield Problem(f"pipeline.{key}", actual, "leave it out, or set parallel.pipeline above 1")


def stage_problems(config: RunConfig) -> Iterator[Problem]:
    """Why the model cannot be cut into the stages that a configuration asks for."""
    keys, size = config.pipeline, get_size(config, 1)
    if not hasattr(config.model, "total_layers"):
        actual = f"{config.parallel.pipeline}, but a model of kind {config.model.kind!r} cannot be cut into stages"
        yield Problem("parallel.pipeline", actual, "allowed: 1")
        return
    if wrong := list(list_chunk_problems(keys.schedule, size)):
        yield from wrong
        return
    layers = count_layers(cast(TransformerModelConfig, config.model))
    try:
        stages = cut_stages(layers, get_placement(config), keys)
    except MtError as error:
        yield from error.problems
        return
    placement = get_placement(config)
    for rank in range(placement.ranks):
        parts = [stages[number] for number in placement.get_stages(rank)]
        if not any(stage.layers or stage.embedding or stage.loss for stage in parts):
            near = format_layout(balance_stages(layers.total, placement.stages))
            actual = f"leaves rank {rank} of the pipeline nothing of the model"
            yield Problem("pipeline.layout", actual, f'give it a layer, as "{near}" does')


def axis_problems(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    """What does not divide as the axes of `layout` need."""
    wrong = list(_tensor(config, layout))
    yield from wrong or _sequence(config, layout)
    yield from _context(config, layout)
    yield from _expert(config, layout)
    yield from _expert_tensor(config, layout)
    yield from _batch(config, layout)


def _tensor(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    tensor, sizes = layout.dims.tensor, get_cut_sizes(config.model, "tensor")
    for size in sizes:
        if not size.fits(tensor):
            most = min((other.size for other in sizes if not other.repeats), default=1)
            fits = _listed(t for t in range(1, most + 1) if all(other.fits(t) for other in sizes))
            yield Problem("parallel.tensor", f"{tensor} does not divide {size.name} {size.size}", f"allowed: {fits}")


def _sequence(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    if not layout.sequence:
        return
    dims, length = layout.dims, config.data.seq_length
    if dims.tensor == 1:
        yield Problem("parallel.sequence", "true, but parallel.tensor is 1", "allowed: false, or a tensor above 1")
    elif length % (dims.context * dims.tensor):
        actual = f"{length} is no multiple of context {dims.context} × tensor {dims.tensor}, as parallel.sequence needs"
        yield Problem("data.seq_length", actual, f"allowed: {_multiples(length, dims.context * dims.tensor)}")


def _context(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    dims, length = layout.dims, config.data.seq_length
    if dims.context == 1:
        return
    if length % (2 * dims.context):
        actual = f"{length} is no multiple of 2 × parallel.context {dims.context}"
        yield Problem("data.seq_length", actual, f"allowed: {_multiples(length, 2 * dims.context)}")
    if layout.cp_comm_type != "all_to_all":
        return
    sizes = [size for size in get_cut_sizes(config.model, "tensor") if size.all_to_all]
    local = {size.name.rpartition(".")[2]: size.local(dims.tensor) for size in sizes}
    for name, size in local.items():
        if size % dims.context:
            actual = f"{dims.context} does not divide the {size} {name} of a tensor rank, as all_to_all needs"
            fits = _listed(_divisors(gcd(*local.values())))
            yield Problem("parallel.context", actual, f'allowed: {fits}, or cp_comm_type = "ring"')


def _expert(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    expert, together = layout.dims.expert, layout.dims.data * layout.dims.context
    if expert == 1:
        return
    if not (sizes := get_cut_sizes(config.model, "expert")):
        actual = f'{expert}, but model.mlp.kind "{config.model.mlp.kind}" has no experts'
        yield Problem("parallel.expert", actual, 'allowed: 1, or model.mlp.kind = "moe"')
        return
    fits = _listed(_divisors(together, lambda e: all(size.fits(e) for size in sizes)))
    for name, number in (*((size.name, size.size) for size in sizes), ("data × context", together)):
        if number % expert:
            yield Problem("parallel.expert", f"{expert} does not divide {name} = {number}", f"allowed: {fits}")


def _expert_tensor(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    size = layout.dims.expert_tensor
    for features in get_cut_sizes(config.model, "expert_tensor"):
        if not features.fits(size):
            fits = _listed(t for t in _divisors(features.size) if t <= size)
            actual = f"{size} tensor ranks do not divide {features.name} = {features.size}"
            yield Problem("parallel.expert_tensor", actual, f"allowed: 1, or a parallel.tensor of {fits}")


def _expert_tensor_key(config: TransformerRun) -> Iterator[Problem]:
    """What is wrong with the key itself, whatever the layout."""
    parallel = config.parallel
    if parallel.expert_tensor is None:
        return
    if not get_cut_sizes(config.model, "expert_tensor"):
        actual = f'{parallel.expert_tensor}, but model.mlp.kind "{config.model.mlp.kind}" has no experts'
        yield Problem("parallel.expert_tensor", actual, 'leave it out, or set model.mlp.kind = "moe"')
    elif problem := find_expert_tensor_problem(parallel):
        yield Problem(*problem)


def get_cut_sizes(model: TransformerModelConfig, axis: str) -> list[CutSize]:
    """The sizes of a model that the ranks of an axis divide."""
    return [size for size in model.cut_sizes() if size.axis == axis]


def _batch(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    unit, batch = layout.micro_batch * layout.dims.data, config.batch.global_batch
    if batch % unit and not config.batch.sizes:  # a schedule of sizes takes the place of global_batch
        actual = f"{batch} is no multiple of micro_batch {layout.micro_batch} × data {layout.dims.data}"
        yield Problem("batch.global_batch", actual, f"allowed: {_multiples(batch, unit)}")


def _shard(config: TransformerRun, layout: Layout) -> Iterator[Problem]:
    size, together = config.parallel.shard_size, layout.dims.data * layout.dims.context
    if size is None:
        return
    if layout.sharding == "replicate":
        actual = f'{size}, but parallel.sharding = "replicate" shares nothing'
        yield Problem("parallel.shard_size", actual, 'leave it unset, or parallel.sharding = "zero1" or "fsdp"')
    elif together % size:
        actual = f"{size} does not divide data × context = {together}"
        yield Problem("parallel.shard_size", actual, f"allowed: {_listed(_divisors(together))}")


def _divisors(number: int, keep: Callable[[int], bool] = lambda _: True) -> Iterator[int]:
    return (n for n in range(1, number + 1) if number % n == 0 and keep(n))


def _multiples(near: int, unit: int) -> str:
    """The multiples of `unit` around a number that is none."""
    below = near // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _listed(numbers: Iterable[int]) -> str:
    *head, last = map(str, numbers)
    return f"{', '.join(head)} or {last}" if head else last
