"""`HuggingFaceTokenizer`: any tokenizer.json, alone or in a model directory, on the `tokenizers` library.

Special tokens are those that transformers gives the directory, with its ids: the ones of tokenizer.json, then what the
files beside it list or name and the vocabulary lacks. They get their ids where they stand in a text, as with Hugging
Face and Megatron's wrapper of it: chat-formatted data relies on it. Unlike there, `encode` adds none around a text:
preprocessing appends the end of document itself, and datasets place `[CLS]` and `[SEP]`. `prefix_ids` says which ones
the files put before a text. As in Megatron's main branch a missing eos stands in for sep and a missing bos for cls, and
the other way round: BERT's files name no eos, Llama's no sep.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from mt_core.errors import MtError, Problem, raise_if
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import LibraryTokenizer, NoSuchToken
from mt_data.tokenizers.saved import write_saved, write_text

TYPE = "HuggingFaceTokenizer"
ID_FILES = ("config.json", "generation_config.json", "token_ids.json")
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Roles with an entry of their own, in the order in which transformers adds their tokens."""
STAND_INS = (("sep", "eos"), ("cls", "bos"), ("eos", "sep"), ("bos", "cls"))
EXTRA_KEYS = ("extra_special_tokens", "additional_special_tokens")
"""Keys of the extra tokens, since transformers 5 and before; the first that is there counts."""
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class HuggingFaceTokenizer(LibraryTokenizer):
    """The tokenizer of a tokenizer.json; its end of document is the model's end-of-sequence token."""

    type = TYPE

    def __init__(self, config: TokenizerConfig) -> None:
        if not config.model:
            raise MtError(TYPE, "needs model", "give --tokenizer-model: a tokenizer.json or a directory with one")
        path = Path(config.model)
        self._path = path / "tokenizer.json" if path.is_dir() else path
        self._tokenizer = read_tokenizer(self._path)
        named = read_named_tokens(self._path.parent)
        self._completed = add_missing_tokens(self._tokenizer, self._path.parent, named)
        vocabulary = self.vocabulary()
        self.vocab_size = max(vocabulary.values()) + 1
        self.special = find_roles(named, vocabulary)
        self._end = find_end(self._path.parent, named, self.special)
        self.additional_special_tokens_ids = find_extra(named, vocabulary)
        self.prefix_ids = find_prefix(self._tokenizer, self._path.parent, named)

    @property
    def eod(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Id that ends a document; `NoSuchToken` if no file says which one does."""
        if self._end is None:
            raise NoSuchToken(
                str(self._path),
                "does not say which token ends a document",
                f'put {{"eos_token": "…"}} into {self._path.with_name("tokenizer_config.json")}',
            )
        return self._end

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, as it was read if it lacked no token, and a tokenizer_config.json that names them."""
        tokenizer = self._tokenizer.to_str(pretty=True) if self._completed else self._path.read_text("utf-8")
        named = {key: _write_tokens(value) for key, value in read_named_tokens(self._path.parent).items()}
        config = read_object(self._path.with_name("tokenizer_config.json")) | named
        config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        if not config.get("eos_token") and self._end is not None:
            config["eos_token"] = self._tokenizer.id_to_token(self._end)
        write_text(directory / "tokenizer.json", tokenizer)
        write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
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


def add_missing_tokens(tokenizer: Tokenizer, directory: Path, named: Mapping[str, Any]) -> bool:
    """Add, as transformers does, every token that the files beside tokenizer.json have and it has not; whether any was.

    Listed tokens come first, in the order of their ids, then those that have a role, then the extra ones. A token that
    the vocabulary has keeps its id. One whose listed id is not the one that it would get is an `MtError`.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [(number, token) for number, token in _list_tokens(directory, named) if token.content not in known]
    problems = []
    for number, token in missing:
        tokenizer.add_tokens([token])
        actual = tokenizer.token_to_id(token.content)
        if number is not None and number != actual:
            problem = f"the files beside it give {token.content!r} the id {number}, here it gets {actual}"
            problems.append(Problem(str(directory / "tokenizer.json"), problem, "files that agree; save them again"))
    raise_if(problems)
    return bool(missing)


def _list_tokens(directory: Path, named: Mapping[str, Any]) -> Iterator[tuple[int | None, AddedToken]]:
    """Id, if one is listed, and token of all that the files beside tokenizer.json list or name."""
    listed = read_object(directory / "tokenizer_config.json").get("added_tokens_decoder")
    if listed is None:
        older = read_object(directory / "added_tokens.json")
        listed = {number: {"content": text, "special": False} for text, number in older.items()}
    try:
        pairs = sorted((int(number), token) for number, token in listed.items())
    except (AttributeError, TypeError, ValueError) as err:
        raise MtError(str(directory), "lists added tokens in an unknown form", "an object of id and token") from err
    yield from ((number, _make_token(token, special=False)) for number, token in pairs)
    roles = [named[f"{role}_token"] for role in ROLES if f"{role}_token" in named]
    others = [
        token for key, token in named.items() if key.endswith("_token") and key.removesuffix("_token") not in ROLES
    ]
    for key in EXTRA_KEYS:
        if isinstance(named.get(key), dict):
            others += named[key].values()
    for token in (*roles, *others, *_list_extra(named)):
        yield None, _make_token(token, special=True)


def _make_token(token: object, *, special: bool) -> AddedToken:
    flags = {key: token[key] for key in FLAGS if key in token} if isinstance(token, dict) else {}
    return AddedToken(_token_text(token), **{"special": special, "normalized": False} | flags)


def find_roles(named: Mapping[str, Any], vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Ids of the special tokens that the files beside the tokenizer name."""
    named_roles = (role for role in ROLES if f"{role}_token" in named and role != "unk")
    roles = {role: vocabulary[_token_text(named[f"{role}_token"])] for role in named_roles}
    stand_ins = {role: roles[other] for role, other in STAND_INS if other in roles}
    return stand_ins | roles


def find_end(directory: Path, named: Mapping[str, Any], special: Mapping[str, int]) -> int | None:
    """Id of the end of document: the eos that is named, else the model's, else sep; None where none is defined."""
    if "eos_token" in named:
        return special["eos"]
    for name in ID_FILES:
        numbers = read_object(directory / name).get("eos_token_id")
        numbers = numbers if isinstance(numbers, list) else [numbers]
        if numbers and isinstance(numbers[0], int):
            return numbers[0]
    return special.get("eos")


def find_extra(named: Mapping[str, Any], vocabulary: Mapping[str, int]) -> tuple[int, ...]:
    """Ids of the extra tokens that the files beside the tokenizer list, T5's `<extra_id_0>` and so on."""
    return tuple(vocabulary[_token_text(token)] for token in _list_extra(named))


def find_prefix(tokenizer: Tokenizer, directory: Path, named: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids before every text: those of the post-processor; if it puts none, the bos that `add_bos_token` asks for."""
    for text in ("a", "1", *tokenizer.get_vocab()):
        if plain := tokenizer.encode(text, add_special_tokens=False).ids:
            ids = tokenizer.encode(text).ids
            before = next(start for start in range(len(ids)) if ids[start : start + len(plain)] == plain)
            if before:
                return tuple(ids[:before])
            break
    asked = read_object(directory / "tokenizer_config.json").get("add_bos_token") is True
    begin = tokenizer.token_to_id(_token_text(named.get("bos_token"))) if asked else None
    return () if begin is None else (begin,)


def read_named_tokens(directory: Path) -> dict[str, Any]:
    """What the files beside the tokenizer name: each `…_token`, and the lists of extra ones.

    special_tokens_map.json has the last word, but is not read where tokenizer_config.json lists all added tokens.
    """
    config = read_object(directory / "tokenizer_config.json")
    if config.get("added_tokens_decoder") is None:
        config |= {key: value for key, value in read_object(directory / "special_tokens_map.json").items() if value}
    return {
        key: value
        for key, value in config.items()
        if (key.endswith("_token") and _token_text(value)) or (key in EXTRA_KEYS and isinstance(value, list | dict))
    }


def _list_extra(named: Mapping[str, Any]) -> list[Any]:
    lists = (named[key] for key in EXTRA_KEYS if isinstance(named.get(key), list))
    return [token for token in next(lists, []) if _token_text(token)]


def _write_tokens(value: object) -> object:
    """Texts of a token, a list of tokens or an object of them: how each is found in a text is in tokenizer.json."""
    if isinstance(value, list):
        return [_token_text(token) for token in value]
    if isinstance(value, dict) and "content" not in value:
        return {name: _token_text(token) for name, token in value.items()}
    return _token_text(value)


def _token_text(token: object) -> str:
    """The text of a token, which may be written as an object with more settings; empty if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as err:
        raise MtError(str(path), f"is not JSON ({err})", "an object") from err
    return value if isinstance(value, dict) else {}
