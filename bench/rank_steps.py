"""Training steps of one rank on random tokens, for scripts that measure inside them: nothing is read or logged."""

from typing import Any

import torch
import torch.distributed as dist

from mt_core.distributed.mesh import make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.parallel.apply import parallelize
from mt_core.parallel.expert.balance import finish_routing
from mt_core.plugins import component
from mt_core.training.loss_scale import LossScale
from mt_core.training.optimizer import parameter_groups
from mt_core.training.state import TrainState
from mt_core.training.step import backward, reduce, update
from mt_core.verification.measure import random_batches


class RankSteps:
    """The ranks of one machine, connected through files in a folder, and this rank's part of a run."""

    def __init__(self, config: Any, rank: int, ranks: int, folder: str, *, cuda: bool = True) -> None:
        self.config = config
        self.device = torch.device("cuda", rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            device_id=self.device if cuda else None,
        )
        self.mesh = make_mesh(resolve_dims(config.parallel, ranks))
        self.model, self.data_parallel, self.pipeline = parallelize(config, self.mesh, self.device)
        groups = parameter_groups(self.data_parallel.main_params, self.data_parallel.shapes, config.optim.weight_decay)
        self.optimizer = component("optimizer", config.optim.name)(groups, config.optim)
        self.scale = LossScale.initial(config.precision).value
        TrainState(self.model, self.data_parallel, self.optimizer, pipeline=self.pipeline).initialize(
            config.runtime.seed
        )

    def run(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of the loss, and the norm of the whole gradient."""
        config, data_parallel = self.config, self.data_parallel
        batches = list(random_batches(config, self.mesh, step, documents=False))
        tokens = config.batch.global_batch * config.data.seq_length
        loss, _ = backward(
            self.model, data_parallel, batches, tokens, self.device, scale=self.scale, pipeline=self.pipeline
        )
        reduce(data_parallel)
        updated = update(
            data_parallel, self.optimizer, lr=config.optim.lr, clip_norm=config.optim.clip_norm, scale=self.scale
        )
        finish_routing(self.model, self.mesh, updated.norm.isfinite())
        data_parallel.wait()
        return loss, updated.norm
