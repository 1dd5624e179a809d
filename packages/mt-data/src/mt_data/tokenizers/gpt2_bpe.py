"""`GPT2BPETokenizer`: GPT-2's byte-level BPE from vocab.json and merges.txt, on the `tokenizers` library.

`<|endoftext|>` standing in a text is encoded as ordinary characters, as Megatron's GPT-2 tokenizer does: only
preprocessing puts an end of document, so a text cannot forge one (docs/specs/data.md §3.3).
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import LibraryTokenizer
from mt_data.tokenizers.saved import write_saved, write_text

END_OF_TEXT = "<|endoftext|>"
TYPE = "GPT2BPETokenizer"
PRINTABLE = (range(33, 127), range(161, 173), range(174, 256))
"""Bytes that GPT-2 spells as the character of the same number; the others take characters from 256 on, in order."""


class GPT2BPETokenizer(LibraryTokenizer):
    """Byte-level BPE whose ids are GPT-2's for GPT-2's files."""

    type = TYPE

    def __init__(self, config: TokenizerConfig) -> None:
        if not config.vocab_file or not config.merge_file:
            missing = "vocab_file" if not config.vocab_file else "merge_file"
            raise MtError(TYPE, f"needs {missing}", "give --vocab-file vocab.json and --merge-file merges.txt")
        self._vocab_path, self._merges_path = Path(config.vocab_file), Path(config.merge_file)
        vocabulary = read_vocabulary(self._vocab_path)
        self._tokenizer = make_byte_level_bpe(vocabulary, read_merges(self._merges_path), str(self._merges_path))
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = vocabulary[END_OF_TEXT]

    def save(self, directory: Path) -> None:
        """Write vocab.json, merges.txt and what `transformers.AutoTokenizer` reads: tokenizer.json and its config."""
        texts = {path.name: path.read_text("utf-8") for path in (self._vocab_path, self._merges_path)}
        vocab, merges = texts.values()
        write_text(directory / "vocab.json", vocab)
        write_text(directory / "merges.txt", merges)
        write_hugging_face_files(self._tokenizer, directory)
        write_saved(self, TYPE, directory)


@cache
def get_byte_letters() -> tuple[str, ...]:
    """The character that GPT-2 spells each byte with."""
    others = [byte for byte in range(256) if not any(byte in bytes_ for bytes_ in PRINTABLE)]
    return tuple(chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256))


def spell_bytes(token: bytes) -> str:
    """A token's bytes in GPT-2's spelling: a space is `Ġ`, a line feed `Ċ`."""
    return "".join(get_byte_letters()[byte] for byte in token)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Token to id from vocab.json; checks that every byte and the end of document have an id."""
    try:
        vocabulary = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as err:
        raise MtError(str(path), f"is not JSON ({err})", "a vocab.json: an object of token to id") from err
    if not isinstance(vocabulary, dict) or not all(isinstance(i, int) and i >= 0 for i in vocabulary.values()):
        raise MtError(str(path), "does not map tokens to ids", "a vocab.json: an object of token to id")
    if missing := {*pre_tokenizers.ByteLevel.alphabet(), END_OF_TEXT} - vocabulary.keys():
        raise MtError(
            str(path),
            f"lacks {len(missing)} tokens that a byte-level vocabulary has, such as {min(missing)!r}",
            f"all 256 bytes and {END_OF_TEXT}; for another tokenizer choose another --tokenizer-type",
        )
    return vocabulary


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs from merges.txt in order. A version header is skipped, and a last line without newline still counts."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as err:
        raise MtError(str(path), "is not UTF-8 text", "a merges.txt: two tokens a line") from err
    merges = []
    for number, line in enumerate(lines, start=1):
        if line and not line.startswith("#version"):
            pair = line.rstrip("\r").split(" ")
            if len(pair) != 2:
                raise MtError(f"{path}:{number}", f"{line[:60]!r} is not a merge", "two tokens with a space between")
            merges.append((pair[0], pair[1]))
    return merges


def make_byte_level_bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], where: str) -> Tokenizer:
    """The library's BPE with GPT-2's splitting pattern and spelling of bytes, and no special tokens."""
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as err:  # the library raises plain Exception
        raise MtError(where, f"does not fit the vocabulary ({err})", "files of one tokenizer") from err
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def write_hugging_face_files(tokenizer: Tokenizer, directory: Path) -> None:
    """Write tokenizer.json, where `<|endoftext|>` is a special token, and a minimal tokenizer_config.json."""
    special = Tokenizer.from_str(tokenizer.to_str())
    special.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    write_text(directory / "tokenizer.json", special.to_str(pretty=True))
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
