"""The metric sink "tensorboard": scalars into event files."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from mt_core.errors import MtError


class TensorBoard:
    """Writes every number of a metrics line as a scalar of that name."""

    name: ClassVar[str] = "tensorboard"

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as err:
            raise MtError("log.sinks", "'tensorboard' is not installed", "pip install 'mt-core[tensorboard]'") from err
        self.writer = SummaryWriter(str(directory))

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one line."""
        for key, value in metrics.items():
            if key != "step" and not isinstance(value, str):
                self.writer.add_scalar(key, value, int(metrics["step"]))

    def close(self) -> None:
        """Flush the event file."""
        self.writer.close()
