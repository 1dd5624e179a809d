"""Configuration of the data: sections, their union, rules and paths. Imports neither torch nor numpy."""

from typing import Any

from mt_data.config.sections import (
    BUILTIN_SECTIONS,
    DEFAULT_SPLIT,
    BERTData,
    Corpora,
    DataSection,
    FIMData,
    GPTData,
    ICTData,
    MaskedData,
    MockData,
    SFTData,
    T5Data,
    TokenizerConfig,
    TokenStream,
)

__all__ = [
    "BUILTIN_SECTIONS",
    "DEFAULT_SPLIT",
    "BERTData",
    "Corpora",
    "DataSection",
    "FIMData",
    "GPTData",
    "ICTData",
    "MaskedData",
    "MockData",
    "SFTData",
    "T5Data",
    "TokenStream",
    "TokenizerConfig",
]


def __getattr__(name: str) -> Any:
    """`DataConfig`, the type of the data section, is made when it is asked for: plugins bring kinds of their own."""
    if name != "DataConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mt_data.config.union import data_union

    return data_union()
