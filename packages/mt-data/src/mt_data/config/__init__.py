"""Configuration of the data: sections, their union, rules and paths. Imports neither torch nor numpy."""

from typing import Any

from mt_data.config.sections import (
    DEFAULT_SPLIT,
    KINDS,
    BERTData,
    Corpora,
    FIMData,
    GPTData,
    ICTData,
    Loading,
    Masking,
    MockData,
    SFTData,
    Stream,
    T5Data,
    TokenizerConfig,
)

__all__ = [
    "DEFAULT_SPLIT",
    "KINDS",
    "BERTData",
    "Corpora",
    "FIMData",
    "GPTData",
    "ICTData",
    "Loading",
    "Masking",
    "MockData",
    "SFTData",
    "Stream",
    "T5Data",
    "TokenizerConfig",
]


def __getattr__(name: str) -> Any:
    """`DataConfig`, the type of the data section, is made when it is asked for: plugins bring kinds of their own."""
    if name != "DataConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mt_data.config.union import data_union

    return data_union()
