"""Configuration of the data; imports neither torch nor numpy, so `mt config` starts fast."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mt_core.config.sections import Section

DEFAULT_SPLIT = "969,30,1"


class TokenizerConfig(Section):
    """Which tokenizer, and the files that it reads."""

    type: str = "GPT2BPETokenizer"
    """A component of kind `tokenizer`."""
    vocab_file: str | None = None
    """vocab.json of GPT2BPETokenizer, token to id; vocab.txt of BertWordPiece, a token a line."""
    merge_file: str | None = None
    """merges.txt of GPT2BPETokenizer: one merge a line, the first has the highest rank."""
    model: str | None = None
    """A tokenizer.json or a directory that holds one, for HuggingFaceTokenizer; the .model of the SentencePiece types
    and Llama2Tokenizer; the .json of TikTokenizer."""
    vocab_size: PositiveInt | None = None
    """Ids of NullTokenizer, its end of document not counted; all ids of TikTokenizer, there 131072 if not given."""
    vocab_extra_ids: NonNegativeInt = 0
    """How many `<extra_id_…>` BertWordPiece and SentencePieceTokenizer have after all other tokens; T5 needs 100."""
    tiktoken_pattern: Literal["v1", "v2"] = "v2"
    """How TikTokenizer splits text before merging."""
    tiktoken_num_special_tokens: PositiveInt = 1000
    """Ids of TikTokenizer that come before the first byte; those without a name are `<SPECIAL_…>`."""
    tiktoken_special_tokens: tuple[str, ...] = ("<unk>", "<s>", "</s>")
    """Names of the first ids of TikTokenizer, these three among them."""


class DataConfig(Section):
    """What every kind of data has."""

    seq_length: PositiveInt
    """Tokens in a sample."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer that made the corpora. It travels with checkpoints, where `mt eval` and `mt generate` find it."""
    cache_dir: str | None = None
    """Directory of the index cache; none: RUN/index-cache."""
    loader_workers: NonNegativeInt = 0
    """Processes that read samples ahead; 0 reads in a thread of the training process."""
    prefetch: PositiveInt = 2
    """Micro-batches that the thread, or each process, reads ahead."""
    order: Literal["single", "cyclic", "cyclic-unsharded"] = "single"
    """Order of the samples: as the dataset has them, once; or shuffled anew in every pass over it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Suffixes of the files that stand behind each path."""
        return (".bin", ".idx")


class Corpora(DataConfig):
    """Tokenised corpora, how they are mixed and split; named in one of four ways."""

    paths: tuple[str, ...] = ()
    """Prefixes of .bin/.idx pairs, or weights and prefixes in turn: ["0.3", "a_text_document", "0.7", "b_document"]."""
    paths_file: str | None = None
    """A text file of what `paths` would hold, with white space between."""
    train_paths: tuple[str, ...] = ()
    """Like `paths`, for training alone: the corpora are not split."""
    valid_paths: tuple[str, ...] = ()
    """Like `paths`, for validation alone."""
    test_paths: tuple[str, ...] = ()
    """Like `paths`, for testing alone."""
    split_paths_file: str | None = None
    """A JSON file with keys train, valid and test: each a list, a string with white space between paths, or null."""
    split: str = DEFAULT_SPLIT
    """Shares of `paths` for training, validation and test; they need not add up to one."""

    @model_validator(mode="after")
    def _split_is_used(self) -> Self:
        if self.split != DEFAULT_SPLIT and (self.train_paths or self.valid_paths or self.test_paths):
            raise ValueError("split divides `paths`; with train_paths, valid_paths or test_paths it must not be given")
        return self


class TokenStream(DataConfig):
    """Samples of consecutive tokens: what they say about the documents in them."""

    eod_mask_loss: bool = False
    """Take the positions whose input token ends a document out of the loss."""
    reset_position_ids: bool = False
    """Add `position_ids`, which start again after each end of document."""
    reset_attention_mask: bool = False
    """Add `segment_ids` [T]: tokens see only those of their segment, which ends behind an end of document."""


class GPTData(Corpora, TokenStream):
    """Samples of consecutive tokens from shuffled documents, for models that predict the next token."""

    kind: Literal["gpt"] = "gpt"
    inter_document_masking: bool = False
    """Add `segment_ids` [T], a number for each document, which tokens do not see beyond, and `position_ids` in each."""
    extra_token: bool = True
    """Read one token more than a sample has, the last one's label; without it that label is padding."""
    keep_partial_valid: bool = False
    """Keep the last validation sample, filled up with padding, although the corpus ends inside it."""


class MockData(TokenStream):
    """Megatron's mock corpus: 100,000 documents 1, 2, 3, … of up to 4095 tokens, a third of them for each split."""

    kind: Literal["mock"] = "mock"
    inter_document_masking: bool = False
    """Add `segment_ids` [T], a number for each document, which tokens do not see beyond, and `position_ids` in each."""


class FIMData(Corpora, TokenStream):
    """GPT samples whose documents are cut in three at random, the middle moved to the end: fill in the middle."""

    kind: Literal["fim"] = "fim"
    rate: float = Field(0.5, ge=0, le=1)
    """Share of the documents in a sample that are changed."""
    spm_rate: float = Field(0.5, ge=0, le=1)
    """Share of those that put the suffix before the prefix."""
    split_token: str | None = None
    """Text of a token that cuts documents into fragments, which are changed one by one."""
    fragment_rate: float = Field(0.5, ge=0, le=1)
    """Share of the fragments of a chosen document that are changed."""
    no_prefix: str | None = None
    """Documents that begin with this text are left alone."""
    prefix_token: str = "<fim_prefix>"
    """Text of the token before the prefix."""
    middle_token: str = "<fim_middle>"
    """Text of the token before the middle."""
    suffix_token: str = "<fim_suffix>"
    """Text of the token before the suffix."""
    pad_token: str = "<fim_pad>"
    """Text of the token that fills up a sample."""
    eod_token: str = "<|endoftext|>"
    """Text of the token that ends a document."""


class MaskedData(Corpora):
    """Sentences of one document with some of their words masked; the corpora are made with `--split-sentences`."""

    mask_prob: float = Field(0.15, ge=0, le=1)
    """Share of the tokens that are masked."""
    short_seq_prob: float = Field(0.1, ge=0, le=1)
    """Share of the samples that are made shorter than `seq_length`."""
    full_words: bool = True
    """Mask whole words, not pieces of them."""
    longer_ngrams: bool = False
    """Favour long runs of words over short ones."""
    permute: bool = False
    """Shuffle as many tokens again among themselves; not with `geometric`."""
    max_ngram: PositiveInt
    """Most words masked in one run."""
    geometric: bool
    """Draw the length of a run from a geometric distribution, p = 0.2, instead of in proportion to 1/length."""

    @model_validator(mode="after")
    def _geometric_or_permuted(self) -> Self:
        if self.geometric and self.permute:
            raise ValueError("permute does not go with geometric; turn one off")
        return self


class BERTData(MaskedData):
    """BERT: two parts of a document, in order or not, and masked words to predict."""

    kind: Literal["bert"] = "bert"
    max_ngram: PositiveInt = 3
    """Most words masked in one run."""
    geometric: bool = False
    """Draw the length of a run from a geometric distribution, p = 0.2, instead of in proportion to 1/length."""
    classification_head: bool = True
    """Samples have two parts, and `is_random` says whether they are exchanged."""


class T5Data(MaskedData):
    """T5: runs of words replaced by sentinels in the encoder's text, which the decoder writes out."""

    kind: Literal["t5"] = "t5"
    decoder_seq_length: PositiveInt = 128
    """Tokens of the decoder's text."""
    max_ngram: PositiveInt = 10
    """Most words masked in one run."""
    geometric: bool = True
    """Draw the length of a run from a geometric distribution, p = 0.2, instead of in proportion to 1/length."""


class ICTData(DataConfig):
    """Inverse cloze task: a sentence asks for the block of sentences that it came from, for bi-encoder retrieval."""

    kind: Literal["ict"] = "ict"
    paths: tuple[str, ...] = ()
    """The prefix of one corpus, made with `--split-sentences`."""
    titles: str | None = None
    """The prefix of a corpus with one sequence for each document: its title."""
    split: str = DEFAULT_SPLIT
    """Shares of the documents for training, validation and test, by the legacy rule of ICT."""
    query_in_block_prob: float = Field(0.1, ge=0, le=1)
    """How often the sentence stays in its block."""
    one_sentence_documents: bool = False
    """Use documents of one sentence too."""


class SFTData(Corpora):
    """Conversations for supervised fine-tuning, packed into samples; only the assistant's words are in the loss."""

    kind: Literal["sft"] = "sft"
    prompt_format: Literal["chatml", "llama3", "template"] = "chatml"
    """How turns are written: in a form whose special tokens the tokenizer must know, or as a chat template says."""
    chat_template: str | None = None
    """A file with the Jinja template; unset: that of the tokenizer's directory."""
    max_untrained: float = Field(0.1, ge=0, le=1)
    """Largest share of lines that have no token to learn, as where the prompt fills the sample; more are refused."""
    pack_lines: bool = False
    """Lines share a sample, as many in their order as fit whole, each apart from the others; else each has its own."""
    conversation_multiple: PositiveInt = 1
    """Each conversation is filled up to a multiple of this; context parallelism needs twice its size."""

    @property
    def files(self) -> tuple[str, ...]:
        """Paths are JSON Lines files themselves: an object with "messages" on each line."""
        return ("",)


BUILTIN_SECTIONS = (GPTData, BERTData, T5Data, ICTData, SFTData, FIMData, MockData)
"""mt-data's own sections; `mt_data.config.union` adds those of other packages."""
