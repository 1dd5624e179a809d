"""Configuration of the data; imports neither torch nor numpy, so `mt config` starts fast."""

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from mt_core.config.section import Section


class TokenizerConfig(Section):
    """Which tokenizer, and the files that it reads."""

    type: str = "GPT2BPETokenizer"
    """A component of kind `tokenizer`."""
    vocab_file: str | None = None
    """vocab.json of GPT2BPETokenizer: token to id."""
    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer: one merge a line, the first has the highest rank."""
    model: str | None = None
    """A tokenizer.json or a directory that holds one, for HuggingFaceTokenizer."""


class DataConfig(Section):
    """Tokenised corpora, how they are mixed and split, and how samples are cut from them."""

    kind: Literal["gpt"] = "gpt"
    paths: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or weights and prefixes in turn: ["0.3", "a_text_document", "0.7", "b_document"]."""
    split: str = "969,30,1"
    """Shares of the sequences for training, validation and test; they need not add up to one."""
    seq_length: PositiveInt
    """Tokens in a sample."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer that made the corpora; training needs it only for `eod_mask_loss`."""
    eod_mask_loss: bool = False
    """Take the positions whose input token ends a document out of the loss."""
    cache_dir: str | None = None
    """Directory of the index cache; none: RUN/index-cache."""
    loader_workers: NonNegativeInt = 0
    """Processes that read samples ahead; 0 reads in the training process."""
