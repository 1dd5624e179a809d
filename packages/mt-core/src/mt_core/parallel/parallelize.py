"""From a configuration to this rank's part of a model: the one path that applies every kind of parallelism."""

from typing import Any

import torch

from mt_core.parallel.context.exchanges import context_core
from mt_core.parallel.cross_entropy import VocabCrossEntropy, compiled_kernels
from mt_core.parallel.data_parallel import DataParallel, data_parallel
from mt_core.parallel.mesh import Mesh
from mt_core.parallel.plan import apply_plan
from mt_core.parallel.recompute import recompute


def parallelize(config: Any, mesh: Mesh, device: torch.device) -> tuple[Any, DataParallel]:
    """The model of a `RunConfig`, its parameters allocated on `device` but uninitialised, and its data parallelism."""
    with torch.device("meta"):
        model = config.model.build(mesh.tensor.size)
    plan = model.plan(mesh.tensor.size)
    placements = apply_plan(model, plan, mesh.tensor, sequence=config.parallel.sequence, expert=mesh.expert)
    for block in model.layers.values():
        block.attn.core = context_core(config.parallel.context_exchange, block.attn.core, axis=mesh.context)
    recompute(model, config.recompute)
    if config.runtime.compile:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward)
        model.loss.op = VocabCrossEntropy(mesh.tensor, config.parallel.sequence, compiled_kernels())
    engine = data_parallel(model, placements, mesh, device=device, precision=config.precision, parallel=config.parallel)
    if config.runtime.compile:
        engine.compile()
    return model, engine
