"""From a configuration to this rank's part of a model: the one path that applies every kind of parallelism."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from mt_core.config.run_config import RunConfig
from mt_core.config.trainable import fused_problems, get_trainable, is_trainable, pattern_problems
from mt_core.contracts import CanonicalModel, Model, StagedModel, as_module
from mt_core.distributed.mesh import Mesh
from mt_core.errors import raise_if
from mt_core.parallel.context.comm_types import make_context_core
from mt_core.parallel.data.protocol import DataParallel, make_data_parallel
from mt_core.parallel.expert.dispatcher import TokenDispatcher
from mt_core.parallel.expert.sequence_shards import SequenceShards, keep, make_sequence_shards
from mt_core.parallel.pipeline.cut import Pipeline, connect_tied, cut_model, make_pipeline
from mt_core.parallel.recompute import list_modules_with_core, recompute
from mt_core.parallel.tensor.cross_entropy import VocabCrossEntropy, compile_kernels, linear_cross_entropy
from mt_core.parallel.tensor.placement import apply_plan
from mt_core.parallel.weight_sums import sum_weight_gradients

KEEPS_FACTORS = MappingProxyType({"allow_buffer_reuse": False, "inplace_buffers": False})
"""Options of Inductor under which compiled code writes into no tensor twice, so that postponed products keep theirs."""


class ParallelModel(NamedTuple):
    """This rank's part of a model, and what spreads the work on it over ranks."""

    model: Model
    data_parallel: DataParallel
    pipeline: Pipeline | None
    """None where every rank has all layers."""


def parallelize(config: RunConfig, mesh: Mesh, device: torch.device) -> ParallelModel:
    """Build a run's model, its parameters allocated on `device` but uninitialised, and its parallelism."""
    with torch.device("meta"):
        model = config.model.build(mesh.tensor.size)
    plan = model.plan(mesh.tensor.size)
    freeze(model, get_trainable(config))
    pipeline = make_pipeline(config, mesh, device) if mesh.pipeline.size > 1 else None
    if pipeline is not None:
        plan = cut_model(cast(StagedModel, model), pipeline, plan)
    placements = apply_plan(
        as_module(model),
        plan,
        mesh.tensor,
        sequence=config.parallel.sequence,
        expert=mesh.expert,
        expert_parts=mesh.expert_parts,
        token_dispatcher=config.parallel.token_dispatcher,
    )
    if pipeline is not None:
        placements = connect_tied(placements, mesh)
    for module in list_modules_with_core(model):
        core = make_context_core(config.parallel.cp_comm_type, module.core, axis=mesh.context)
        module.core = disable_tracing(core) if config.runtime.compile and mesh.context.size > 1 else core
    share_sequences(model, make_sequence_shards(mesh, sequence=config.parallel.sequence))
    recompute(model, config.recompute)
    postponed = pipeline.postponed if pipeline is not None and pipeline.splits_backward else None
    if config.runtime.compile:
        options = KEEPS_FACTORS if postponed else {}
        compile_parts(model, mesh, sequence=config.parallel.sequence, options=options)
    data_parallel = make_data_parallel(
        model, placements, mesh, device=device, precision=config.precision, parallel=config.parallel
    )
    sum_weight_gradients(model, data_parallel, config, postponed)
    allocate_buffers(as_module(model), data_parallel.dtype, device)
    if config.runtime.compile:
        data_parallel.compile()
    return ParallelModel(model, data_parallel, pipeline)


def allocate_buffers(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Allocate the buffers of a model on meta, filled with zeros: floating-point ones in their data type or wider."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            wide = torch.promote_types(buffer.dtype, dtype) if buffer.is_floating_point() else buffer.dtype
            setattr(part, name, torch.zeros(buffer.shape, dtype=wide, device=device))


def freeze(model: CanonicalModel, patterns: Sequence[str]) -> None:
    """Turn gradients off for the parameters that `optim.trainable` leaves out; `MtError` if one would be split."""
    canonical = {name: [*model.canonical_regions(name)] for name, _ in model.named_parameters()}
    names = [name for parts in canonical.values() for name in parts]
    raise_if([*pattern_problems(patterns, names), *fused_problems(patterns, canonical.values())])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(canonical[name][0], patterns))


def share_sequences(model: Model, shards: SequenceShards) -> None:
    """Tell every module with `shards` which other ranks have parts of its sequences."""
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "shards"):
            module.shards = shards


def compile_parts(model: Model, mesh: Mesh, *, sequence: bool, options: Mapping[str, bool]) -> None:
    """Compile each block, with these options of Inductor, and the loss with torch.compile."""
    modules: Any = model.modules()
    ranks, *functions = make_sequence_shards(mesh, sequence=sequence)
    share_sequences(model, SequenceShards(ranks, *(f if f is keep else disable_tracing(f) for f in functions)))
    for module in modules:
        op: Any = getattr(module, "op", None)
        if op is linear_cross_entropy or isinstance(op, VocabCrossEntropy):
            module.op = VocabCrossEntropy(mesh.tensor, sequence, compile_kernels())
        elif not getattr(op, "traceable", True):
            module.op = UntracedDispatcher(op) if hasattr(op, "send") else disable_tracing(op)
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, options=dict(options))  # pyright: ignore[reportArgumentType] a module's method


class UntracedDispatcher:
    """A token dispatcher between ranks, both steps of which run eagerly in a compiled layer."""

    def __init__(self, dispatcher: TokenDispatcher) -> None:
        self.send, self.run = disable_tracing(dispatcher.send), disable_tracing(dispatcher.run)


def disable_tracing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that communicates with other ranks, which Dynamo cannot trace, so that it runs eagerly.

    Not a decorator where it is defined: that would import Dynamo, for a second, into every process that trains nothing.
    """

    def run(*inputs: Any, **keywords: Any) -> Any:
        return function(*inputs, **keywords)

    disabled: Any = torch.compiler.disable(run, reason="collectives cannot be traced")
    return disabled
