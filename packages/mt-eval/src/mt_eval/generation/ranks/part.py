"""A rank's part of a model in generation: its layers, its heads of them, and their blocks of the cache.

Every rank calls the same methods with the same arguments, in the same order. The last stage of the pipeline is the
first rank's, so features and logits arrive where tokens are chosen. A whole model is the part of the only rank.

Shape suffixes: B sequences, T tokens of each, N tokens of a pass, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mt_core.distributed.mesh import Mesh
from mt_core.parallel.tensor.collectives import all_gather_async
from mt_core.parallel.tensor.cross_entropy import cap_logits
from mt_core.pipeline.layout_string import Stage
from mt_eval.generation.exact.batch_invariance import BatchInvariance
from mt_eval.generation.exact.layers import make_exact
from mt_models.layers.kv_cache import CachePass, KVCache, Span
from mt_models.models.gpt import GPT


class ModelPart:
    """A GPT in eval mode, or this rank's part of one, and the blocks of its cache."""

    def __init__(self, model: GPT, mesh: Mesh | None = None, stage: Stage | None = None) -> None:
        """Without a mesh the model is whole."""
        self.model, self.mesh = model, mesh or Mesh()
        self.stage = stage or Stage(range(model.config.layers), embedding=True, loss=True)
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        exact = BatchInvariance(model.parameters()) if self.device.type == "cpu" else None
        self._logits = nullcontext() if exact is None else exact
        self._layers = nullcontext() if exact is None else make_exact(model, exact)
        self._cache: KVCache | None = None

    def measure_block(self, block_size: int) -> int:
        """Bytes of a block of the cache, on the rank where it has most."""
        size = torch.tensor(self.model.make_cache(1, block_size).nbytes, device=self.device)
        return int(self.mesh.world.max_(size))

    def allocate(self, blocks: int, block_size: int) -> None:
        """Make a cache of so many blocks."""
        self._cache = self.model.make_cache(blocks, block_size)

    @property
    def cache(self) -> KVCache:
        """What `allocate` has made."""
        assert self._cache is not None, "a cache is allocated before the first pass"
        return self._cache

    def run(self, tokens: Sequence[int], spans: Sequence[Span], cleared: Sequence[int]) -> Tensor | None:
        """Compute the tokens of these spans after some blocks were cleared; their features [N, D] in the last stage."""
        if cleared:
            self.cache.clear(cleared)
        step = self.cache.place(spans)
        self.model.check_length(step.length)
        tokens_N1 = torch.tensor(tokens, device=self.device)[:, None]
        with torch.inference_mode(), self._layers:
            x_N1D = self._pass_stage(tokens_N1, step.positions_N1, step)
        return None if x_N1D is None else x_N1D[:, 0]

    def compute_hidden(self, tokens_BT: Tensor) -> Tensor | None:
        """The features [B, T, D] of whole sequences, without a cache, in the last stage."""
        tokens_BT = tokens_BT.to(self.device)
        self.model.check_length(tokens_BT.shape[1])
        with torch.inference_mode():
            return self._pass_stage(tokens_BT, torch.arange(tokens_BT.shape[1], device=self.device), None)

    def compute_logits(self, x_ND: Tensor | None, rows: int) -> Tensor | None:
        """Logits [N, V] of the true vocabulary for features that the first rank has, on the ranks of the last stage."""
        if not self.stage.loss:
            return None
        axis, config = self.mesh.tensor, self.model.config
        with torch.inference_mode(), self._logits:
            if axis.size == 1:
                assert x_ND is not None
                return self.model.logits(x_ND[:, None])[:, 0]
            shape = (rows, config.hidden_size)
            x_ND = torch.empty(shape, dtype=self.dtype, device=self.device) if x_ND is None else x_ND.contiguous()
            dist.broadcast(x_ND, group=axis.group, group_src=0)
            part_NV = F.linear(x_ND, self.model.output_weight)
            whole_NV = all_gather_async(part_NV, axis, -1)()[:, : config.vocab_size]
            return cap_logits(whole_NV, config.logit_softcap)

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros."""
        self.cache.clear(blocks)

    def forget(self, table: Sequence[int], start: int, end: int) -> None:
        """Fill the places of a sequence's positions from `start` to before `end` with zeros."""
        self.cache.forget(table, start, end)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to others."""
        self.cache.copy(sources, targets)

    def _pass_stage(self, tokens_BT: Tensor, positions: Tensor, step: CachePass | None) -> Tensor | None:
        """Pass tokens through this rank's layers: on to the next stage, or normalised out of the last."""
        axis, model = self.mesh.pipeline, self.model
        if self.stage.embedding:
            x_BTD = model.embed_inputs(tokens_BT, positions)
        else:
            shape = (*tokens_BT.shape, model.config.hidden_size)
            x_BTD = axis.receive_(torch.empty(shape, dtype=self.dtype, device=self.device), axis.rank + 1)
        x_BTD = model.run_layers(x_BTD, positions, step, numbers=self.stage.layers)
        if self.stage.loss:
            return model.norm(x_BTD)
        axis.send(x_BTD.contiguous(), axis.rank - 1)
        return None
