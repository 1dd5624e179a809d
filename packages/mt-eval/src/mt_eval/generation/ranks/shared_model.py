"""A model that ranks share, as the first rank sees it: a call tells the others to do the same with their parts.

Only the first rank knows of requests, samples tokens and answers, so ranks cannot disagree on a token. The others wait
for calls in a group of its own, without a limit of time: a server may have nothing to do for days. A rank that ends
closes its connections, which whoever waits for it notices at once.

Shape suffixes: B sequences, T tokens of each, N tokens of a pass, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mt_core.errors import MtError
from mt_eval.generation.ranks.part import ModelPart
from mt_models.config import GPTConfig
from mt_models.layers.kv_cache import Span

WITHOUT_LIMIT = timedelta(days=3650)
END = ""
"""The call that ends the other ranks' work."""


class Calls:
    """The group in which the first rank tells the others what to do; every rank must make one."""

    def __init__(self) -> None:
        group = dist.new_group(backend="gloo", timeout=WITHOUT_LIMIT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group

    def send(self, method: str, *arguments: Any) -> None:
        """Tell the other ranks to call a method of their parts, or with `END` to end."""
        dist.broadcast_object_list([(method, arguments)], src=0, group=self._group, device=torch.device("cpu"))

    def receive(self) -> tuple[str, tuple[Any, ...]]:
        """Wait for the next call of the first rank."""
        call: list[Any] = [None]
        dist.broadcast_object_list(call, src=0, group=self._group, device=torch.device("cpu"))
        return call[0]


def follow(part: ModelPart, calls: Calls) -> None:
    """Do what the first rank says until it says `END`: the work of every other rank."""
    while True:
        method, arguments = calls.receive()
        if method == END:
            return
        getattr(part, method)(*arguments)


class SharedModel:
    """What `ModelPart` offers, of all ranks together, and what scoring needs of a model."""

    def __init__(self, part: ModelPart, calls: Calls) -> None:
        self._part, self._calls, self.device = part, calls, part.device
        self._has_cache = False

    @property
    def config(self) -> GPTConfig:
        """The whole model's."""
        return self._part.model.config

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of this rank's part."""
        return self._part.model.parameters()

    def measure_block(self, block_size: int) -> int:
        """Bytes of a block of the cache, on the rank where it has most."""
        self._calls.send("measure_block", block_size)
        return self._part.measure_block(block_size)

    def allocate(self, blocks: int, block_size: int) -> None:
        """Make the caches of all ranks; `MtError` if there are any, since two engines would write over each other's."""
        if self._has_cache:
            raise MtError("model", "has an engine already", "use that one: ranks that share a model have one cache")
        self._has_cache = True
        self._calls.send("allocate", blocks, block_size)
        self._part.allocate(blocks, block_size)

    def run(self, tokens: Sequence[int], spans: Sequence[Span], cleared: Sequence[int]) -> Tensor:
        """Compute the tokens of these spans after some blocks were cleared; their features [N, D]."""
        self._calls.send("run", tokens, spans, cleared)
        return _of_last_stage(self._part.run(tokens, spans, cleared))

    def compute_logits(self, x_ND: Tensor, rows: int) -> Tensor:
        """Logits [N, V] of the true vocabulary for features of so many rows."""
        self._calls.send("compute_logits", None, rows)
        return _of_last_stage(self._part.compute_logits(x_ND, rows))

    def clear(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros, on all ranks."""
        self._calls.send("clear", blocks)
        self._part.clear(blocks)

    def forget(self, table: Sequence[int], start: int, end: int) -> None:
        """Fill the places of a sequence's positions from `start` to before `end` with zeros, on all ranks."""
        self._calls.send("forget", table, start, end)
        self._part.forget(table, start, end)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy blocks to others, on all ranks."""
        self._calls.send("copy", sources, targets)
        self._part.copy(sources, targets)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final normalised features [B, T, D] of whole sequences."""
        self._calls.send("compute_hidden", tokens_BT.cpu())
        return _of_last_stage(self._part.compute_hidden(tokens_BT))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to [B, T, V]."""
        flat = x_BTD.flatten(0, -2)
        return self.compute_logits(flat, len(flat)).unflatten(0, x_BTD.shape[:-1])

    def end(self) -> None:
        """End the other ranks' work."""
        self._calls.send(END)


def _of_last_stage(result: Tensor | None) -> Tensor:
    assert result is not None, "the first rank has the last stage"
    return result
