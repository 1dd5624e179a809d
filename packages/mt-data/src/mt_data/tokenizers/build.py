"""A tokenizer from its configuration, or from a directory that holds its files."""

from pathlib import Path

from mt_core.contracts import Tokenizer
from mt_core.errors import MtError, raise_if
from mt_core.plugins import component
from mt_data.config import TokenizerConfig
from mt_data.config.rules import tokenizer_problems
from mt_data.tokenizers.saved import SAVED, check_fingerprint, read_saved


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that a configuration names; an `MtError` lists everything wrong with it."""
    raise_if(tokenizer_problems(config, "tokenizer"))
    return component("tokenizer", config.type)(config)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in a directory: what `save` wrote, else a tokenizer.json, else vocab.json and merges.txt."""
    config = detect_tokenizer(directory)
    tokenizer = build_tokenizer(config)
    check_fingerprint(tokenizer, directory)
    return tokenizer


def detect_tokenizer(directory: Path) -> TokenizerConfig:
    """Which tokenizer the files in a directory are of."""
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    if (directory / SAVED).is_file():
        saved = read_saved(directory)
        if saved.options:
            return saved.config(directory)
        kind = saved.type
    elif (directory / "tokenizer.json").is_file():
        kind = "HuggingFaceTokenizer"
    elif vocab.is_file() and merges.is_file():
        kind = "GPT2BPETokenizer"
    else:
        raise MtError(str(directory), "holds no tokenizer", f"{SAVED}, tokenizer.json, or vocab.json and merges.txt")
    return TokenizerConfig(
        type=kind,
        vocab_file=str(vocab) if vocab.is_file() else None,
        merge_file=str(merges) if merges.is_file() else None,
        model=str(directory),
    )
