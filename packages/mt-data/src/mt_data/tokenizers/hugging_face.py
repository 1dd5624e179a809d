"""`HuggingFaceTokenizer`: any tokenizer.json, alone or in a model directory, on the `tokenizers` library.

Special tokens standing in a text get their ids, as with Hugging Face and Megatron's wrapper of it: chat-formatted data
relies on it. Unlike there, none is added around a text: preprocessing appends the end of document itself, and datasets
place `[CLS]` and `[SEP]`. As in Megatron's main branch a missing eos stands in for sep and a missing bos for cls, and
the other way round: BERT's files name no eos, Llama's no sep.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import LibraryTokenizer
from mt_data.tokenizers.saved import write_saved, write_text

TYPE = "HuggingFaceTokenizer"
TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
ID_FILES = ("config.json", "generation_config.json")
ROLES = ("cls", "sep", "pad", "mask", "bos", "eos")
STAND_INS = (("sep", "eos"), ("cls", "bos"), ("eos", "sep"), ("bos", "cls"))
EXTRA_KEYS = ("additional_special_tokens", "extra_special_tokens")
"""Keys of the extra tokens, before and since transformers 5."""
COMMON_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")


class HuggingFaceTokenizer(LibraryTokenizer):
    """The tokenizer of a tokenizer.json; its end of document is the model's end-of-sequence token."""

    type = TYPE

    def __init__(self, config: TokenizerConfig) -> None:
        if not config.model:
            raise MtError(TYPE, "needs model", "give --tokenizer-model: a tokenizer.json or a directory with one")
        path = Path(config.model)
        self._path = path / "tokenizer.json" if path.is_dir() else path
        self._tokenizer = read_tokenizer(self._path)
        vocabulary = self.vocabulary()
        self.vocab_size = max(vocabulary.values()) + 1
        self.special = find_roles(self._path.parent, vocabulary)
        self.eod = find_end(self._path.parent, vocabulary, self.special)
        self.additional_special_tokens_ids = find_extra(self._path.parent, vocabulary)

    def save(self, directory: Path) -> None:
        """Write tokenizer.json as it was read, and a tokenizer_config.json that names the end of document."""
        tokenizer = self._path.read_text("utf-8")
        config = read_object(self._path.with_name("tokenizer_config.json")) | read_named_tokens(self._path.parent)
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if not config.get("eos_token"):
            config["eos_token"] = self._tokenizer.id_to_token(self.eod)
        write_text(directory / "tokenizer.json", tokenizer)
        write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_saved(self, TYPE, directory)


def read_tokenizer(path: Path) -> Tokenizer:
    """The library's tokenizer, neither truncating nor padding."""
    if not path.is_file():
        raise MtError(str(path), "does not exist", "a tokenizer.json or a directory that holds one")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as err:  # the library raises plain Exception
        raise MtError(str(path), f"is not a tokenizer.json ({err})", "a file of the Hugging Face library") from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_end(directory: Path, vocabulary: dict[str, int], special: Mapping[str, int]) -> int:
    """Id of the end of document: what the files beside the tokenizer name, else a well-known token, else sep."""
    for candidate in _named_ends(directory):
        number = candidate if isinstance(candidate, int) else vocabulary.get(candidate)
        if number is not None:
            return number
    for token in COMMON_ENDS:
        if token in vocabulary:
            return vocabulary[token]
    if "sep" in special:
        return special["sep"]
    raise MtError(
        str(directory / "tokenizer.json"),
        "does not say which token ends a document",
        f'put {{"eos_token": "…"}} into {directory / "tokenizer_config.json"}',
    )


def find_roles(directory: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """Ids of the special tokens that the files beside the tokenizer name."""
    named = read_named_tokens(directory)
    ids = {role: vocabulary.get(_token_text(named.get(f"{role}_token"))) for role in ROLES}
    roles = {role: number for role, number in ids.items() if number is not None}
    stand_ins = {role: roles[other] for role, other in STAND_INS if other in roles}
    return stand_ins | roles


def find_extra(directory: Path, vocabulary: dict[str, int]) -> tuple[int, ...]:
    """Ids of the extra tokens that the files beside the tokenizer name, T5's `<extra_id_0>` and so on."""
    named = read_named_tokens(directory)
    lists = (named[key] for key in EXTRA_KEYS if isinstance(named.get(key), list))
    return tuple(vocabulary[text] for token in next(lists, []) if (text := _token_text(token)) in vocabulary)


def read_named_tokens(directory: Path) -> dict[str, Any]:
    """What the files beside the tokenizer say of special tokens; tokenizer_config.json has the last word."""
    names = (*(f"{role}_token" for role in ROLES), *EXTRA_KEYS)
    merged = {
        key: value for file in reversed(TOKEN_FILES) for key, value in read_object(directory / file).items() if value
    }
    return {key: value for key, value in merged.items() if key in names}


def _token_text(token: Any) -> str:
    """The text of a token, which may be written as an object with more settings; empty if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _named_ends(directory: Path) -> Iterator[str | int]:
    if token := _token_text(read_named_tokens(directory).get("eos_token")):
        yield token
    for name in ID_FILES:
        numbers = read_object(directory / name).get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [numbers]
        yield from (number for number in numbers[:1] if isinstance(number, int))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as err:
        raise MtError(str(path), f"is not JSON ({err})", "an object") from err
    return value if isinstance(value, dict) else {}
