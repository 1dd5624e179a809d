"""The tokenizer's files, which travel with the weights unchanged, and the special ids they declare."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mt_ckpt.tensor_streams.safetensors_directory import read_json
from mt_core.contracts import ID_FILES
from mt_core.errors import Problem

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
    "mt_tokenizer.json",
    "token_ids.json",
)
GENERATION, TOKEN_IDS = ID_FILES
ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
"""Keys of config.json and generation_config.json that name tokens; an end may be a list."""


def find_tokenizer_files(path: Path) -> list[Path]:
    """Those of the known files that a directory holds."""
    return [path / name for name in NAMES if (path / name).is_file()]


def carry_token_ids(declared: Mapping[str, Any], files: Sequence[Path]) -> list[Path]:
    """The files, and one more with the ids that a config.json declares, if its generation_config.json has others.

    That file, `token_ids.json`, lies in a folder which goes with this process.
    """
    ids = _pick_ids(declared)
    generation = next((_pick_ids(read_json(file)) for file in files if file.name == GENERATION), {})
    if ids == generation:
        return [*files]
    folder = Path(tempfile.mkdtemp(prefix="mt-token-ids-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / TOKEN_IDS).write_text(json.dumps(ids, indent=2) + "\n")
    return [*files, folder / TOKEN_IDS]


def _pick_ids(declared: Mapping[str, Any]) -> dict[str, Any]:
    return {key: declared[key] for key in ID_KEYS if declared.get(key) is not None}


def special_ids(files: Iterable[Path]) -> dict[str, Any]:
    """Ids of the tokens that begin and end texts and fill up batches, as a config.json holds them; empty if unknown.

    What a config.json declared goes first, then a generation_config.json, then the tokenizer's end of document.
    """
    by_name = {file.name: read_json(file) for file in files if file.suffix == ".json"}
    if TOKEN_IDS in by_name:
        return _pick_ids(by_name[TOKEN_IDS])
    ids = _pick_ids(by_name.get(GENERATION, {}))
    if "eos_token_id" in ids:
        return ids
    if (eod := by_name.get("mt_tokenizer.json", {}).get("eod")) is not None:
        return ids | {"eos_token_id": eod}
    token = by_name.get("tokenizer_config.json", {}).get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    added = {t["content"]: t["id"] for t in by_name.get("tokenizer.json", {}).get("added_tokens", ())}
    return ids | ({"eos_token_id": added[text]} if text in added else {})


def size_problems(files: Iterable[Path], vocab_size: int) -> Iterator[Problem]:
    """Tokenizers with ids for which the model has no embedding; rows to spare are padding."""
    for file in files:
        if (
            file.name in ("tokenizer.json", "vocab.json", "mt_tokenizer.json")
            and (ids := _ids(file))
            and max(ids) >= vocab_size
        ):
            problem = f"has ids up to {max(ids)}, the model embeds {vocab_size}"
            yield Problem(str(file), problem, "use the checkpoint's own tokenizer, or resize its embedding first")


def _ids(file: Path) -> list[int]:
    """The ids in a tokenizer's file; none where it holds another kind of model."""
    read = read_json(file)
    if file.name == "mt_tokenizer.json":
        return [*range(read.get("vocab_size", 0))]
    model = read.get("model", {}) if file.name == "tokenizer.json" else {"vocab": read}
    vocab = model.get("vocab", {})
    ids = [*vocab.values()] if isinstance(vocab, dict) else [*range(len(vocab))]
    return ids + [token["id"] for token in read.get("added_tokens", ()) if isinstance(token, dict)]
