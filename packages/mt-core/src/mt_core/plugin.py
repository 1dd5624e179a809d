"""What mt-core provides."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components() -> Iterable[Component]:
    """The optimizers."""
    return [Component("optimizer", "adamw", "mt_core.training.optimizer:adamw", "AdamW with decoupled weight decay")]


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """Rules between mt-core's own sections."""
    from mt_core.config.rules import problems

    return list(problems(config))


@hookimpl
def mt_metric_sinks(run_dir: Path, names: tuple[str, ...]) -> list[Any]:
    """TensorBoard event files under RUN/tensorboard, when `log.sinks` names "tensorboard"."""
    if "tensorboard" not in names:
        return []
    from mt_core.training.metrics import TensorBoard

    return [TensorBoard(run_dir / "tensorboard")]
