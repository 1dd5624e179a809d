"""What receives the metrics of a run."""

from collections.abc import Mapping
from typing import ClassVar, Protocol


class MetricSink(Protocol):
    """Receives every line of metrics.jsonl as it is written."""

    name: ClassVar[str]

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Record one line; `metrics["step"]` is the optimizer step."""
        ...

    def close(self) -> None:
        """Flush; called once, at the end of the run."""
        ...
