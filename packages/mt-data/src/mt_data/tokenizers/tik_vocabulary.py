"""The vocabulary file of `TikTokenizer`: JSON, a list of {rank, token_bytes, token_str} (docs/specs/data.md §3.5)."""

import base64
import binascii
import json
from pathlib import Path
from typing import Any

from mt_core.errors import MtError

KEYS = {"rank", "token_bytes", "token_str"}
FORM = "a list of {rank, token_bytes, token_str}, rank counting from 0"


def read_ranks(path: Path, count: int) -> tuple[bytes, dict[bytes, int]]:
    """The file's bytes, and token to rank of its first `count` entries."""
    if not path.is_file():
        raise MtError(str(path), "does not exist", "a vocabulary of TikTokenizer, a .json file")
    content = path.read_bytes()
    try:
        entries = json.loads(content)
    except ValueError as err:
        raise MtError(str(path), f"is not JSON ({err})", FORM) from err
    if not isinstance(entries, list):
        raise MtError(str(path), "is not a list", FORM)
    if len(entries) < count:
        found = f"has {len(entries):,} tokens, {count:,} are needed for vocab_size less the special tokens"
        raise MtError(str(path), found, "a smaller --vocab-size or more --tiktoken-num-special-tokens")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:count]):
        token = _token(entry, rank, str(path))
        if rank < 256 and token != bytes([rank]):
            raise MtError(f"{path}[{rank}]", f"is {token!r}", "the 256 bytes in order as the first 256 tokens")
        if ranks.setdefault(token, rank) != rank:
            raise MtError(f"{path}[{rank}]", f"is {token!r}, as is entry {ranks[token]}", "each token once")
    if count < 256:
        raise MtError(str(path), f"{count} tokens are left for bytes", "a --vocab-size with room for all 256")
    return content, ranks


def _token(entry: Any, rank: int, path: str) -> bytes:
    if not isinstance(entry, dict) or set(entry) != KEYS:
        raise MtError(f"{path}[{rank}]", f"is {str(entry)[:60]}", FORM)
    if entry["rank"] != rank:
        raise MtError(f"{path}[{rank}]", f"has rank {entry['rank']}", "ranks that count from 0 in order")
    try:
        return base64.b64decode(entry["token_bytes"], validate=True)
    except (binascii.Error, TypeError, ValueError) as err:
        raise MtError(f"{path}[{rank}]", f"token_bytes is not base64: {entry['token_bytes']!r}", FORM) from err
