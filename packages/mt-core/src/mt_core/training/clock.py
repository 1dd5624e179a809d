"""Speed between two log lines."""

import time
from typing import Any

import torch

from mt_core.config.lengths import sequence_lengths
from mt_core.training.state import Position

PEAK_FLOPS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12}
"""Dense bf16 peaks by the vendor's datasheets, for the share of peak in metrics."""


class Clock:
    """Time and tokens between two log lines, evaluations and checkpoints left out."""

    def __init__(self, config: Any, position: Position, device: torch.device, ranks: int) -> None:
        self._config, self._position, self._device, self._ranks = config, position, device, ranks
        self.restart()

    def restart(self) -> None:
        """Start a new interval."""
        position = self._position
        self._start = self._now()
        self._step, self._tokens, self._samples = position.step, position.tokens, position.samples

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self) -> dict[str, float | int]:
        """Speed since the last lap."""
        steps = self._position.step - self._step
        seconds = (self._now() - self._start) / steps
        tokens_per_s = (self._position.tokens - self._tokens) / steps / seconds
        read_per_s = (self._position.samples - self._samples) * self._config.data.seq_length / steps / seconds
        flops = self._config.model.flops_per_token(*sequence_lengths(self._config.data)) * read_per_s / self._ranks
        values: dict[str, float | int] = {
            "step_ms": seconds * 1e3,
            "tokens_per_s": tokens_per_s,
            "eta_s": seconds * (self._config.train.steps - self._position.step),
            "tflops_per_rank": flops / 1e12,
        }
        if self._device.type == "cuda":
            values["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if peak := PEAK_FLOPS.get(torch.cuda.get_device_name()):
                values["share_of_peak"] = flops / peak
        self.restart()
        return values
