"""GPT-2's byte-level BPE by tiktoken: the same ids as the `tokenizers` library, several times as fast.

tiktoken joins two tokens whenever the result is in the vocabulary, `tokenizers` only if the pair is listed as a merge.
The two are the same when ids rise with merges, no token is the result of two merges, and every token comes out of its
own text as itself: then, at the time when a token's merge has its turn and its ends are still ends of tokens, what is
between them is what its own text gives, which is the listed pair. `is_equivalent` checks that for given files.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import models

from mt_core.contracts import Tokenizer
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.gpt2_bpe import END_OF_TEXT, GPT2BPETokenizer, get_byte_letters, read_merges, read_vocabulary

PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
LONG_SPACE = 1 << 16
"""White space in one run, from which on tiktoken's regular expressions give up."""

EncodeBatch = Callable[[Sequence[str]], Sequence[Sequence[int]]]


def choose_encode(tokenizer: Tokenizer, config: TokenizerConfig) -> EncodeBatch:
    """The fastest function that gives the ids of `tokenizer.encode_batch`."""
    if type(tokenizer) is not GPT2BPETokenizer or not config.vocab_file or not config.merge_file:
        return tokenizer.encode_batch
    try:
        import tiktoken
    except ModuleNotFoundError:
        return tokenizer.encode_batch
    vocabulary, merges = read_vocabulary(Path(config.vocab_file)), read_merges(Path(config.merge_file))
    if not is_equivalent(vocabulary, merges):
        return tokenizer.encode_batch
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=rank_bytes(vocabulary), special_tokens={})
    return lambda texts: [_encode(text, encoding.encode_ordinary, tokenizer) for text in texts]


def _encode(text: str, ordinary: Callable[[str], list[int]], tokenizer: Tokenizer) -> list[int]:
    if " " * LONG_SPACE in text or "\n" * LONG_SPACE in text:
        return tokenizer.encode(text)
    try:
        return ordinary(text)
    except BaseException as err:  # what a Rust library raises when it panics is no Exception
        if type(err).__name__ != "PanicException":
            raise
        return tokenizer.encode(text)


def is_equivalent(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """Whether tiktoken gives the same ids for every text; the argument is at the top of this file."""
    merged = [left + right for left, right in merges]
    if len(set(merged)) < len(merged) or {*merged, *get_byte_letters(), END_OF_TEXT} != vocabulary.keys():
        return False
    ids = [vocabulary[token] for token in merged]
    parts_first = all(
        len(part) == 1 or vocabulary.get(part, number) < number
        for pair, number in zip(merges, ids, strict=True)
        for part in pair
    )
    if ids != sorted(ids) or not parts_first:
        return False
    bpe = Library(
        models.BPE(vocab=dict(vocabulary), merges=list(merges))
    )  # on the spelling of bytes, nothing around it
    encoded = bpe.encode_batch_fast(merged, add_special_tokens=False)
    return all(encoding.ids == [number] for encoding, number in zip(encoded, ids, strict=True))


def rank_bytes(vocabulary: Mapping[str, int]) -> dict[bytes, int]:
    """Bytes of every token but the end of document, and its id."""
    alphabet = {letter: byte for byte, letter in enumerate(get_byte_letters())}
    return {
        bytes(alphabet[character] for character in token): number
        for token, number in vocabulary.items()
        if token != END_OF_TEXT
    }
