"""`TikTokenizer`: byte-level BPE from the JSON vocabulary of NVIDIA's models, on tiktoken.

The vocabulary is a list of {rank, token_bytes, token_str} (docs/specs/data.md §3.5). Special tokens have the first ids,
bytes and merges come after them. A special token in a text is ordinary characters, as in Megatron v0.11; today's main
branch recognises it there, which lets a text end its own document. Only `<unk>`, `<s>` and `</s>` are named unless
`tiktoken_special_tokens` names more; main also names `<mask>`, `<pad>`, `<cls>` and `<sep>`. Where v0.11 wants a
pattern to be chosen, v2 is taken, as main does.
"""

import base64
import binascii
import json
import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import MaskingTokenizer, count_threads
from mt_data.tokenizers.gpt2_bpe import spell_bytes
from mt_data.tokenizers.saved import write_bytes, write_saved

REQUIRED = ("<unk>", "<s>", "</s>")
ROLES = {"bos": "<s>", "eos": "</s>", "mask": "<mask>", "pad": "<pad>", "cls": "<cls>", "sep": "<sep>"}
USUAL_SIZE = 131_072
FILE = "tiktoken.json"
CAPITAL, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERNS = {
    "v1": (
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
    ),
    "v2": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}*{SMALL}+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITAL}+{SMALL}*",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ),
}
"""What a piece of text can be, the first that fits; merges stay within a piece."""
LONG_SPACE = 500_000
"""White space from which on tiktoken may crash (found: at 999,999); the `regex` package splits such texts."""
KEYS = {"rank", "token_bytes", "token_str"}
FILE_FORM = "a list of {rank, token_bytes, token_str}, rank counting from 0"


class TikTokenizer(MaskingTokenizer):
    """tiktoken over a JSON vocabulary; `</s>` ends documents."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        if not config.model:
            raise MtError(self.type, "needs model", "give --tokenizer-model: the vocabulary as .json")
        path = Path(config.model)
        self._options = {
            "vocab_size": config.vocab_size or USUAL_SIZE,
            "tiktoken_pattern": config.tiktoken_pattern,
            "tiktoken_num_special_tokens": config.tiktoken_num_special_tokens,
            "tiktoken_special_tokens": config.tiktoken_special_tokens,
        }
        self.vocab_size = config.vocab_size or USUAL_SIZE
        self._special_ids = make_special_ids(config, self.vocab_size)
        self._content, ranks = read_ranks(path, self.vocab_size - len(self._special_ids))
        self._pattern = "|".join(PATTERNS[config.tiktoken_pattern])
        library = import_library("tiktoken", where=self.type, requires=["mt-data[tiktoken]"])
        self._encoding: Any = library.Encoding(
            f"mt {path.name}",  # a name that the library has no encoding of its own for, as pickling looks it up
            pat_str=self._pattern,
            mergeable_ranks={token: rank + len(self._special_ids) for token, rank in ranks.items()},
            special_tokens=self._special_ids,
            explicit_n_vocab=self.vocab_size,
        )
        self.special = {role: self._special_ids[name] for role, name in ROLES.items() if name in self._special_ids}
        self.eod = self.special["eos"]

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._encode_spaces(text) if has_long_space(text) else self._encoding.encode_ordinary(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the characters [begin, end) that it holds a byte of."""
        ids = self.encode(text)
        sizes = [len(self._encoding.decode_single_token_bytes(number)) for number in ids]
        character = [place for place, letter in enumerate(text) for _ in letter.encode("utf-8", "surrogatepass")]
        ends = list(accumulate(sizes))
        return ids, [(character[end - size], character[end - 1] + 1) for size, end in zip(sizes, ends, strict=True)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        if any(map(has_long_space, texts)):
            return [self.encode(text) for text in texts]
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=count_threads())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode([int(number) for number in ids], errors="replace")

    def vocabulary(self) -> dict[str, int]:
        """Token to id, in GPT-2's spelling of bytes; bytes that spell a special token's name end in a space."""
        vocabulary = dict(self._special_ids)
        for number in range(len(vocabulary), self.vocab_size):
            spelling = spell_bytes(self._encoding.decode_single_token_bytes(number))
            vocabulary[f"{spelling} " if spelling in self._special_ids else spelling] = number
        return vocabulary

    def save(self, directory: Path) -> None:
        """Write tiktoken.json, the vocabulary as it was read, and the options."""
        write_bytes(directory / FILE, self._content)
        write_saved(self, self.type, directory, options={"model": FILE} | self._options)

    def _encode_spaces(self, text: str) -> list[int]:
        import regex  # comes with tiktoken

        pieces = regex.findall(self._pattern, text)
        return [number for piece in pieces for number in self._encoding._encode_single_piece(piece)]


def has_long_space(text: str) -> bool:
    """Whether a text has so much white space in one place that tiktoken may crash."""
    return len(text) >= LONG_SPACE and re.search(rf"\s{{{LONG_SPACE}}}", text) is not None


def make_special_ids(config: TokenizerConfig, vocab_size: int) -> dict[str, int]:
    """Id of each special token: those that are named, then as many `<SPECIAL_…>` as are left."""
    names, count = config.tiktoken_special_tokens, config.tiktoken_num_special_tokens
    if count >= vocab_size:
        actual = f"{count} leaves nothing of a vocabulary of {vocab_size}"
        raise MtError("tiktoken_num_special_tokens", actual, f"less than {vocab_size}, or a larger vocab_size")
    if len(names) > count:
        actual = f"{count}, but {len(names)} tokens are named"
        raise MtError("tiktoken_num_special_tokens", actual, f"at least {len(names)}")
    if missing := [name for name in REQUIRED if name not in names]:
        raise MtError("tiktoken_special_tokens", f"lacks {' '.join(missing)}", f"{' '.join(REQUIRED)} and any others")
    ids = {name: number for number, name in enumerate(names)}
    ids |= {f"<SPECIAL_{number}>": number for number in range(len(names), count)}
    if len(ids) < count:
        raise MtError("tiktoken_special_tokens", f"names a token twice: {' '.join(names)}", "each token once")
    return ids


def read_ranks(path: Path, count: int) -> tuple[bytes, dict[bytes, int]]:
    """The file's bytes, and token to rank of its first `count` entries."""
    if not path.is_file():
        raise MtError(str(path), "does not exist", "a vocabulary of TikTokenizer, a .json file")
    content = path.read_bytes()
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as err:
        raise MtError(str(path), f"is not JSON ({err})", FILE_FORM) from err
    if not isinstance(entries, list):
        raise MtError(str(path), "is not a list", FILE_FORM)
    if len(entries) < count:
        actual = f"has {len(entries):,} tokens, {count:,} are needed for vocab_size less the special tokens"
        raise MtError(str(path), actual, "a smaller --vocab-size or more --tiktoken-num-special-tokens")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:count]):
        token = _decode_token(entry, rank, str(path))
        if rank < 256 and token != bytes([rank]):
            raise MtError(f"{path}[{rank}]", f"is {token!r}", "the 256 bytes in order as the first 256 tokens")
        if ranks.setdefault(token, rank) != rank:
            raise MtError(f"{path}[{rank}]", f"is {token!r}, as is entry {ranks[token]}", "each token once")
    if count < 256:
        raise MtError(str(path), f"{count} tokens are left for bytes", "a --vocab-size with room for all 256")
    return content, ranks


def _decode_token(entry: Any, rank: int, path: str) -> bytes:
    if not isinstance(entry, dict) or set(entry) != KEYS:
        raise MtError(f"{path}[{rank}]", f"is {str(entry)[:60]}", FILE_FORM)
    if entry["rank"] != rank:
        raise MtError(f"{path}[{rank}]", f"has rank {entry['rank']}", "ranks that count from 0 in order")
    try:
        return base64.b64decode(entry["token_bytes"], validate=True)
    except (binascii.Error, TypeError, ValueError) as err:
        raise MtError(f"{path}[{rank}]", f"token_bytes is not base64: {entry['token_bytes']!r}", FILE_FORM) from err
