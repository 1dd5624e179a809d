"""Configuration of the data: sections, their union, rules and paths. Imports neither torch nor numpy."""

from mt_data.config.sections import (
    BUILTIN_SECTIONS,
    DEFAULT_SPLIT,
    BERTData,
    Corpora,
    DataConfig,
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
    "DataConfig",
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
