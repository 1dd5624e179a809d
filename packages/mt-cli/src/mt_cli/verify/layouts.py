"""Which layouts `mt verify` compares with one rank, and on how many ranks. Torch-free."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import lcm
from typing import Any

from mt_core.config.loading import Layer, merge, read_override, validate
from mt_core.config.run_config import TransformerRun
from mt_core.config.sections import ParallelConfig, PipelineConfig
from mt_core.distributed.topology import resolve_dims
from mt_core.errors import MtError, Problem, raise_if
from mt_core.parallel.layout import problems
from mt_core.pipeline.layout_string import format_layout
from mt_core.pipeline.schedule_table import SCHEDULES
from mt_core.pipeline.stages import balance_stages
from mt_models.plugin import mt_config_rules

MOST_RANKS = 64
"""Processes of one machine that a comparison may take."""
EXAMPLE = '--layout "tensor=2,sequence=true", or --ranks 2 for data parallelism'


@dataclass(frozen=True, slots=True)
class Case:
    """A layout to compare."""

    name: str
    parallel: ParallelConfig
    """With `data` set."""
    ranks: int


def cases(config: TransformerRun, layouts: Sequence[str], ranks: int | None) -> list[Case]:
    """The layouts asked for, or the configuration's own with few data ranks; all that is impossible is one `MtError`.

    With `ranks`, data ranks are what the other axes leave of them.
    """
    if layouts:
        chosen = [_case(text, parse_layout(text, config.parallel), ranks) for text in layouts]
    else:
        chosen = [_configured_case(config, ranks)]
    for case in chosen:
        if case.ranks == 1 and config.recompute.granularity == "none":
            where = case.name if layouts else "parallel"
            raise MtError(where, "one rank that recomputes nothing: nothing to compare", f"give {EXAMPLE}")
        if case.ranks > MOST_RANKS:
            raise MtError(case.name, f"{case.ranks} ranks", f"allowed: at most {MOST_RANKS}; give a smaller --layout")
    raise_if(problem for case in chosen for problem in _problems(with_parallel(config, case.parallel), case.ranks))
    return chosen


def _problems(config: TransformerRun, ranks: int) -> Iterator[Problem]:
    """What the layout cannot do, and what it cannot do with this model."""
    yield from problems(config, ranks)
    yield from mt_config_rules(config)


def parse_layout(text: str, base: ParallelConfig) -> ParallelConfig:
    """`tensor=2,sequence=true` as a section: what it does not say is the default, or for buckets and overlap `base`'s.

    Keys are those of the section `parallel`.
    """
    values: dict[str, Any] = base.model_dump(include={"overlap_grad_reduce", "overlap_param_gather", "bucket_size"})
    for pair in text.split(","):
        if "=" not in pair:
            raise MtError(f"--layout {text}", f"{pair!r} is not of the form field=value", f"for example {EXAMPLE}")
        values = merge(values, read_override(pair.strip()).values)
    return validate(ParallelConfig, values, [Layer(f"--layout {text}", values)])


def smaller(parallel: ParallelConfig) -> ParallelConfig:
    """This layout with fewer data ranks and stages, and fewer that share a state or experts: what two do, many do."""
    shard, data = parallel.shard_size and min(parallel.shard_size, 2), parallel.data or 1
    expert = next((size for size in range(2, parallel.expert + 1) if parallel.expert % size == 0), 1)
    least = min(data, 2)
    if expert > 1 and data * parallel.context > parallel.expert:  # several ranks hold the same experts
        least = max(least, -(-2 * expert // parallel.context))
    fewer = {"data": None, "shard_size": shard, "expert": expert, "pipeline": min(parallel.pipeline, 2)}
    small = parallel.model_copy(update=fewer)
    return small.model_copy(update={"data": data_ranks(small, at_least=least)})


def data_ranks(parallel: ParallelConfig, *, at_least: int = 1) -> int:
    """Data ranks that show what is sharded: two that share, or two that share with two that have copies."""
    sharded, shard = parallel.sharding != "replicate", parallel.shard_size or 1
    data = max(at_least, 2) if sharded else at_least
    while data * parallel.context % lcm(shard, parallel.expert) or (sharded and data * parallel.context < 2 * shard):
        data += 1
    return data


def with_parallel(config: TransformerRun, parallel: ParallelConfig) -> Any:
    """The configuration in another layout, with as small a batch as that takes."""
    samples = config.batch.micro_batch * (parallel.data or 1) * count_microbatches(parallel)
    batch = config.batch.model_copy(update={"global_batch": samples, "rampup": None, "sizes": None})
    return with_stages(config.model_copy(update={"parallel": parallel, "batch": batch}))


def count_microbatches(parallel: ParallelConfig) -> int:
    """A number of micro-batches that every schedule takes."""
    return 2 * parallel.pipeline if parallel.pipeline > 1 else 1


def count_chunks(config: TransformerRun) -> int:
    """Stages of a rank of the pipeline: as many as its schedule needs, or two where there are more."""
    fewest = SCHEDULES[config.pipeline.schedule].chunks[0]
    return min(config.pipeline.virtual_stages or fewest, max(fewest, 2))


def with_stages(config: TransformerRun) -> Any:
    """The configuration with its layers as even as can be over the stages of its schedule, or without a pipeline."""
    ranks = config.parallel.pipeline
    if ranks == 1:
        return config.model_copy(update={"pipeline": PipelineConfig()})
    keys, chunks = config.pipeline, count_chunks(config)
    layout = format_layout(balance_stages(config.model.total_layers, ranks * chunks))
    stages = PipelineConfig(schedule=keys.schedule, virtual_stages=chunks, layout=layout)
    return config.model_copy(update={"pipeline": stages})


def _configured_case(config: TransformerRun, ranks: int | None) -> Case:
    small = smaller(config.parallel)
    if ranks is not None:
        small = small.model_copy(update={"data": None})
    case = _case("", small, ranks)
    changed = case.parallel.model_dump(exclude_defaults=True, exclude={"bucket_size"})
    return replace(case, name=",".join(f"{field}={_plain(value)}" for field, value in changed.items()))


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _case(name: str, parallel: ParallelConfig, ranks: int | None) -> Case:
    if ranks is None:
        ranks = (parallel.data or data_ranks(parallel)) * parallel.tensor * parallel.context * parallel.pipeline
    data = resolve_dims(parallel, ranks).data
    return Case(name, parallel.model_copy(update={"data": data}), ranks)
