"""A step in which every sequence has one token, recorded once as a CUDA graph and replayed with one call.

Launching a kernel takes the host longer than most kernels of a small pass take the GPU, and a layer has ten or more. A
graph is recorded for each of some numbers of rows; what a step needs is one tensor, copied to the GPU, and what it
decides comes back in another. The first step of a graph is computed without it as well: if results differ, or it cannot
be recorded, steps stay as they were, and a line says so.

Shape suffixes: N rows, P blocks of a table, D hidden size, V vocabulary.
"""

import sys
from collections.abc import Sequence as Values
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mt_eval.generation.sequences import Decoded
from mt_models.layers.decode_pass import DecodePass, supports_kernels
from mt_models.layers.kv_cache import KVCache, Span
from mt_models.models.gpt import GPT

TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 2e-3}
"""How far a graph's logits may be from those of the plain step, by their norm."""
WARM_UP = 2
"""Passes before a graph is recorded, in which libraries allocate and kernels are compiled."""


@dataclass(frozen=True, slots=True)
class Row:
    """A sequence's next token."""

    token: int
    position: int
    table: Values[int]


@dataclass(frozen=True, slots=True)
class Recording:
    """A pass over so many rows: where its inputs are, and what it gives."""

    rows: Tensor
    """int32 [N, 2 + P]: token, position and table."""
    logits_NV: Tensor
    decided_2N: Tensor
    """The likeliest tokens, and whether the largest logits are finite."""
    graph: Any = None
    """None where a pass is computed again each time."""


class DecodeStep:
    """Passes of one token a sequence, with fixed shapes."""

    def __init__(self, model: GPT, cache: KVCache, *, scratch: int) -> None:
        """`scratch` is a block of the cache that no sequence has."""
        self.model, self.cache, self.scratch = model, cache, scratch
        self.device = cache.k.device
        self.graphs = self.device.type == "cuda"
        self.failed = False
        self._recordings: dict[int, Recording] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None  # one graph runs at a time
        self._width = -(-model.config.max_seq_len // cache.block_size)

    def run(self, rows: Values[Row]) -> Decoded | None:
        """Compute the rows' tokens; None if the plain step has to, here and from now on."""
        if self.failed:
            return None
        size = choose_size(len(rows))
        try:
            written = self.write(rows, size)
            if size not in self._recordings:
                self._recordings[size] = self._record(size)
                self._check(self._recordings[size], written, rows)
            return None if self.failed else self._replay(self._recordings[size], written, len(rows))
        except Exception as err:  # a compiler's, a library's, a driver's: the plain step needs none of them
            if isinstance(err, torch.OutOfMemoryError) or not self.graphs:
                raise
            self._fail(f"cannot be recorded ({type(err).__name__}: {' '.join(str(err).split())[:300]})")
            return None

    def write(self, rows: Values[Row], size: int) -> Tensor:
        """The tensor of a pass, on the host, with rows for nobody at its end."""
        written = torch.zeros(size, 2 + self._width, dtype=torch.int32, pin_memory=self.graphs)
        numbers = written.numpy()
        numbers[len(rows) :, 2] = self.scratch
        for row, each in zip(numbers, rows, strict=False):
            row[0], row[1] = each.token, each.position
            row[2 : 2 + len(each.table)] = each.table
        return written

    def _record(self, size: int) -> Recording:
        rows = self.write([], size).to(self.device)
        if not self.graphs:
            return Recording(rows, *self._compute(rows))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._compute(rows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_NV, decided_2N = self._compute(rows)
        return Recording(rows, logits_NV, decided_2N, graph)

    def _compute(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the rows, and what they decide."""
        with torch.inference_mode():
            step = DecodePass(self.cache, rows, kernels=supports_kernels(self.model.config, self.cache.k))
            x_N1D = self.model.hidden(step.tokens_N1, cache=step)
            logits_NV = self.model.logits(x_N1D)[:, 0]
            largest_N, likeliest_N = logits_NV.max(-1)
            return logits_NV, torch.stack((likeliest_N, largest_N.isfinite().long()))

    def _replay(self, recording: Recording, written: Tensor, count: int) -> Decoded:
        with torch.inference_mode():
            recording.rows.copy_(written, non_blocking=True)
            if recording.graph is None:
                logits_NV, decided_2N = self._compute(recording.rows)
            else:
                recording.graph.replay()
                logits_NV, decided_2N = recording.logits_NV, recording.decided_2N
            likeliest, finite = decided_2N[:, :count].tolist()
        return Decoded(logits_NV[:count], [bool(each) for each in finite], likeliest)

    def _check(self, recording: Recording, written: Tensor, rows: Values[Row]) -> None:
        """Compare the first step with the plain one, which writes the same keys and values."""
        spans = [Span(row.position, 1, row.table) for row in rows]
        tokens_N1 = torch.tensor([[row.token] for row in rows], device=self.device)
        with torch.inference_mode():
            expected_NV = self.model.logits(self.model.hidden(tokens_N1, cache=self.cache.place(spans)))[:, 0].float()
            actual_NV = self._replay(recording, written, len(rows)).logits_NV.float()
            good_N = expected_NV.amax(-1).isfinite()
            difference = float((actual_NV - expected_NV)[good_N].norm() / expected_NV[good_N].norm().clamp_min(1e-30))
        if difference > TOLERANCES.get(self.cache.k.dtype, 1e-6):
            self._fail(f"gives other logits than the plain one, by {difference:.1e} of their norm")

    def _fail(self, reason: str) -> None:
        self.failed = True
        self._recordings.clear()
        print(f"mt: the recorded step of generation {reason}; steps stay slower", file=sys.stderr, flush=True)


def choose_size(rows: int) -> int:
    """Rows of the smallest recording that has room: powers of 2 up to 32, then multiples of 16."""
    return -(-rows // 16) * 16 if rows > 32 else 1 << max(rows - 1, 0).bit_length()


def can_record(model: GPT, weight: Tensor) -> bool:
    """Whether a model's steps are worth recording, and can be: experts' tokens are counted on the host."""
    return supports_kernels(model.config, weight) and model.config.mlp.kind != "moe"
