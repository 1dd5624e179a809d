"""What the passes of a pipeline compute in a step: a micro-batch's way through a stage, and the loss at its end.

Every rank of a pipeline reads the same micro-batches, so each stage has the masks, positions, labels and dropout keys
that it needs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from mt_core.contracts import EdgeTensor, Model, StagedModel, as_module
from mt_core.parallel.data.protocol import DataParallel
from mt_core.parallel.pipeline.cut import Pipeline
from mt_core.parallel.pipeline.runtime import Edge
from mt_core.pipeline.actions import Action
from mt_core.training.batch_inputs import Batch, ModelInputs, prepare_inputs
from mt_core.training.losses import LossSums, add_metrics, add_up_losses


class PipelinedPasses:
    """Forward passes of micro-batches, and the sums of their losses."""

    def __init__(
        self,
        model: Model,
        pipeline: Pipeline,
        batches: Sequence[Batch],
        device: torch.device,
        update_heartbeat: Callable[[], None],
    ) -> None:
        self.model, self.pipeline = cast(StagedModel, model), pipeline
        self.update_heartbeat = update_heartbeat
        self.dtype = next(as_module(model).parameters()).dtype
        self.sums: list[LossSums] = []
        context = pipeline.mesh.context
        self.inputs: list[ModelInputs] = [prepare_inputs(model, batch, context, device) for batch in batches]
        """The arguments of each micro-batch on the device: copies come before messages, for which they might wait."""

    def edge_tensors(self, stage: int, microbatch: int) -> Mapping[str, EdgeTensor]:
        """The tensors that a stage passes on, of which a tensor rank has a part under sequence parallelism."""
        arguments = self.inputs[microbatch].arguments
        tensors = self.model.edge_tensors(self.pipeline.stages[stage], arguments, self.dtype)
        return {name: self._cut_tokens(tensor) for name, tensor in tensors.items()}

    def _cut_tokens(self, tensor: EdgeTensor) -> EdgeTensor:
        if not tensor.per_token:
            return tensor
        samples, length, *rest = tensor.shape
        return tensor._replace(shape=(samples, length // self.pipeline.sequence_parts, *rest))

    def forward(self, stage: int, microbatch: int, edge: Edge) -> tuple[Edge, Tensor | None]:
        """Pass a micro-batch through a stage; the last one's losses are summed up, and not differentiated."""
        arguments, mask_BT = self.inputs[microbatch]
        output = self.model.run_stage(self.pipeline.stages[stage], edge, **arguments)
        sums = add_up_losses(output.losses, mask_BT)
        self.sums.append(sums)
        return output.edge, self.take_loss(sums)

    def take_loss(self, sums: LossSums) -> Tensor | None:
        """What is differentiated: nothing."""
        return None

    def begin_pass(self, action: Action, *, last: bool) -> None:
        """Show that the rank makes progress."""
        self.update_heartbeat()

    def finish_chunk(self, chunk: int) -> None:
        """Do nothing: there are no gradients."""


class PipelinedStep(PipelinedPasses):
    """The passes of a training step."""

    def __init__(
        self,
        model: Model,
        data_parallel: DataParallel,
        pipeline: Pipeline,
        batches: Sequence[Batch],
        device: torch.device,
        update_heartbeat: Callable[[], None],
    ) -> None:
        super().__init__(model, pipeline, batches, device, update_heartbeat)
        self.data_parallel = data_parallel
        self.loss = torch.zeros((), device=device, dtype=torch.promote_types(self.dtype, torch.float32))
        """The step's loss, on the rank of the last stage; 0 in this dtype on the others, with which it is summed."""
        self.metrics: dict[str, Tensor] = {}

    def divide_losses(self, tokens: float, samples: float, scale: float) -> None:
        """Set what sums of losses are divided by, and the factor with which they are differentiated."""
        self.tokens, self.samples, self.scale = tokens, samples, scale

    def take_loss(self, sums: LossSums) -> Tensor | None:
        """The micro-batch's part of the step's loss, scaled; None before the last stage."""
        self.sums.clear()
        self.metrics = add_metrics(self.metrics, sums.metrics)
        if sums.tokens is None and sums.samples is None:
            return None
        loss = sums.mean(self.tokens, self.samples)
        self.loss = self.loss + loss.detach()
        return loss * self.scale

    def begin_pass(self, action: Action, *, last: bool) -> None:
        """Let gradients be reduced as they become complete, if this is the step's last pass on this rank."""
        super().begin_pass(action, last=last)
        if last:
            self.data_parallel.last_backward()

    def finish_chunk(self, chunk: int) -> None:
        """Reduce the gradients of the chunk's layers."""
        self.data_parallel.complete(self._list_parameters(chunk))

    def _list_parameters(self, chunk: int) -> list[str]:
        """The parameters of a chunk's layers: the ends of the model may belong to several stages of a rank."""
        blocks, first = [*self.model.layers.values()], 0
        for number in sorted(self.pipeline.local_stages):
            count = len(self.pipeline.stages[number].layers)
            if number == self.pipeline.local_stages[chunk]:
                ids = {id(p) for block in blocks[first : first + count] for p in block.parameters()}
                return [name for name, p in self.model.named_parameters() if id(p) in ids]
            first += count
        raise AssertionError(f"chunk {chunk} of {len(self.pipeline.local_stages)}")
