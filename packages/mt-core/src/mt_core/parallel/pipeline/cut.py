"""From a whole model to this rank's stages of it, and which weights several ranks have.

The module keeps the names of the whole model, so checkpoints, initial weights and plans need not know of stages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import cast

import torch
import torch.distributed as dist

from mt_core.config.run_config import RunConfig
from mt_core.contracts import StagedModel, TransformerModelConfig, as_module
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.pipeline.channels import Channels
from mt_core.parallel.tensor.placement import Placement
from mt_core.parallel.tensor.plan import Plan
from mt_core.parallel.tensor.weight_gradients import PostponedProducts
from mt_core.pipeline.actions import Placement as StagePlacement
from mt_core.pipeline.actions import Schedule
from mt_core.pipeline.layout_string import Stage
from mt_core.pipeline.schedule_table import SCHEDULES, build_schedule, get_placement, get_size
from mt_core.pipeline.stages import count_layers, cut_stages


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages of a run, which of them this rank has, and its channels to other ranks."""

    config: RunConfig
    mesh: Mesh
    placement: StagePlacement
    stages: tuple[Stage, ...]
    """All of the model, in order."""
    channels: Channels
    postponed: PostponedProducts
    """Gradients of weights that the schedule computes apart from those of inputs."""

    @property
    def rank(self) -> int:
        """This rank's position on the pipeline."""
        return self.mesh.pipeline.rank

    @property
    def local_stages(self) -> tuple[int, ...]:
        """The numbers of this rank's stages, by chunk."""
        return self.placement.get_stages(self.rank)

    @property
    def sequence_parts(self) -> int:
        """Tensor ranks that have a part each of the tokens between stages."""
        return self.mesh.tensor.size if self.config.parallel.sequence else 1

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed apart: FSDP2 frees weights after a pass, so its cannot be split."""
        splits = SCHEDULES[self.config.pipeline.schedule].split_backward
        return splits and self.config.parallel.sharding != "fsdp"

    def build_schedule(self, microbatches: int) -> Schedule:
        """The schedule of a step of so many micro-batches; `MtError` if it does not take them."""
        return build_schedule(self.config.pipeline.schedule, get_size(self.config, microbatches))


def make_pipeline(config: RunConfig, mesh: Mesh, device: torch.device) -> Pipeline:
    """Connect the ranks of a pipeline, whose tensors are on `device`; every rank must call it."""
    placement = get_placement(config)
    stages = cut_stages(count_layers(cast(TransformerModelConfig, config.model)), placement, config.pipeline)
    return Pipeline(config, mesh, placement, stages, Channels(mesh, placement, device), PostponedProducts())


def cut_model(model: StagedModel, pipeline: Pipeline, plan: Plan) -> Plan:
    """Drop what this rank's stages lack, and return the plan without the rules of what was dropped."""
    before = [name for name, _ in as_module(model).named_modules()]
    model.keep_stages([pipeline.stages[number] for number in pipeline.local_stages])
    after = [name for name, _ in as_module(model).named_modules()]
    return {
        pattern: rule for pattern, rule in plan.items() if _matches(pattern, after) or not _matches(pattern, before)
    }


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def connect_tied(placements: Mapping[str, Placement], mesh: Mesh) -> dict[str, Placement]:
    """Connect the ranks that have the same weight, such as an embedding that is the head as well; every rank must call
    it. Each computes a part of the weight's gradient."""
    names: list[list[str]] = [[*placements] for _ in range(mesh.pipeline.size)]
    dist.all_gather_object(names, [*placements], group=mesh.pipeline.group)
    positions: dict[str, tuple[int, ...]] = {}
    for position, some in enumerate(names):
        for name in some:
            positions[name] = (*positions.get(name, ()), position)
    axes: dict[tuple[int, ...], Axis] = {
        ranks: mesh.connect_stages("tied", ranks) for ranks in sorted({*positions.values()}) if len(ranks) > 1
    }
    return {
        name: replace(placement, tied=axes[positions[name]]) if len(positions[name]) > 1 else placement
        for name, placement in placements.items()
    }
