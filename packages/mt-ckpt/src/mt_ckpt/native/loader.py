"""Native checkpoints: a run directory (its latest committed step) or a step directory."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from mt_core.checkpoint import native
from mt_core.config.loading import model_config
from mt_core.contracts import ModelConfig


class Native:
    """A `CheckpointLoader` for mt's own format."""

    def __init__(self, path: Path) -> None:
        self.step = native.resolve(path)

    def config(self) -> ModelConfig:
        """The model's configuration."""
        return model_config(native.read_meta(self.step)["config"]["model"])

    def trained_seq_length(self) -> int | None:
        """Tokens of the samples that the run trained on; None for a model that did not come from a run."""
        return native.read_meta(self.step)["config"].get("data", {}).get("seq_length")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time."""
        return native.stream(self.step)

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer that travels with the checkpoint."""
        return native.tokenizer_files(self.step)
