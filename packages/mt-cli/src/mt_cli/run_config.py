"""The whole configuration of a run, assembled from the sections of the installed packages. Torch-free."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mt_core.config.load import load, model_union
from mt_core.config.section import Section
from mt_core.config.sections import (
    BatchConfig,
    CheckpointConfig,
    LogConfig,
    LRScheduleConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    RuntimeConfig,
    TrainConfig,
)
from mt_core.errors import MtError


@cache
def run_config_type() -> type[Section]:
    """The type of the tree: `model` is any installed model family, `data` comes from mt-data."""
    from pydantic import create_model

    try:
        from mt_data.config import DataConfig
    except ModuleNotFoundError as err:
        raise MtError("data", "mt-data is not installed", "pip install mt-data") from err
    sections: dict[str, Any] = {
        "model": (model_union(), ...),
        "data": (DataConfig, ...),
        "batch": (BatchConfig, BatchConfig()),
        "optim": (OptimConfig, OptimConfig()),
        "train": (TrainConfig, TrainConfig()),
        "lr_schedule": (LRScheduleConfig, LRScheduleConfig()),
        "precision": (PrecisionConfig, PrecisionConfig()),
        "parallel": (ParallelConfig, ParallelConfig()),
        "recompute": (RecomputeConfig, RecomputeConfig()),
        "checkpoint": (CheckpointConfig, CheckpointConfig()),
        "log": (LogConfig, LogConfig()),
        "runtime": (RuntimeConfig, RuntimeConfig()),
    }
    return create_model("RunConfig", __base__=Section, **sections)


def load_run_config(
    files: Sequence[Path], overrides: Sequence[str] = (), preset: str | None = None, *, rules: bool = True
) -> Any:
    """A validated `RunConfig`; one `MtError` with everything wrong in it. `rules` includes those between sections."""
    return load(run_config_type(), files, overrides, preset, rules=rules)


def to_toml(config: Section) -> str:
    """The resolved tree as a TOML file that loads to the same tree."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
