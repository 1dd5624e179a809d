"""The tokenizer travels with the weights."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GenerationConfig

from mt_ckpt.conversion.convert import convert
from mt_ckpt.tensor_streams.tokenizer_files import NAMES, find_tokenizer_files, special_ids
from mt_core.errors import MtError


@pytest.fixture
def with_tokenizer(save_model):
    path = save_model("llama")
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "to", "be", "or", "not"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "README.md").write_text("not a tokenizer's file")
    return path


def round_trip(path, tmp_path):
    convert("hf", path, "native", tmp_path / "native")
    return convert("native", tmp_path / "native", "hf", tmp_path / "hf").tokenizer_files


def write(directory: Path, **files: object) -> list[Path]:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return find_tokenizer_files(directory)


def test_known_files_travel_unchanged(with_tokenizer, tmp_path):
    names = round_trip(with_tokenizer, tmp_path)
    assert set(names) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert all((tmp_path / "hf" / name).read_bytes() == (with_tokenizer / name).read_bytes() for name in names)


def test_transformers_loads_the_tokenizer_of_the_result(with_tokenizer, tmp_path):
    round_trip(with_tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("to be or not to be")["input_ids"] == [3, 4, 5, 6, 3, 4]


def test_the_end_of_sequence_reaches_config_and_generation_config(with_tokenizer, tmp_path):
    (with_tokenizer / "generation_config.json").unlink()
    round_trip(with_tokenizer, tmp_path)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 2
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == 2


def test_without_a_tokenizer_no_special_ids_are_made_up(save_model, tmp_path):
    path = save_model("llama", bos_token_id=None, eos_token_id=None)
    (path / "generation_config.json").unlink()
    assert round_trip(path, tmp_path) == ()
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (None, None)
    assert not (tmp_path / "hf" / "generation_config.json").exists()


def test_every_known_name_is_found(tmp_path):
    for name in NAMES:
        (tmp_path / name).write_text("{}")
    assert [path.name for path in find_tokenizer_files(tmp_path)] == list(NAMES)


def test_generation_config_speaks_first(tmp_path):
    files = write(tmp_path, generation_config={"eos_token_id": [7, 8], "bos_token_id": 1}, mt_tokenizer={"eod": 3})
    assert special_ids(files) == {"eos_token_id": [7, 8], "bos_token_id": 1}


def test_mts_own_tokenizer_ends_documents_with_eod(tmp_path):
    assert special_ids(write(tmp_path, mt_tokenizer={"eod": 256})) == {"eos_token_id": 256}


def test_an_end_token_that_the_vocabulary_lacks_is_no_id(tmp_path):
    files = write(tmp_path, tokenizer_config={"eos_token": {"content": "</s>"}}, tokenizer={"added_tokens": []})
    assert special_ids(files) == {}


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(MtError, match=r"tokenizer_config\.json: not JSON"):
        special_ids(find_tokenizer_files(tmp_path))
