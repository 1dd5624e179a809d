"""Ids of special tokens, through mt's own format and Megatron's and back, as transformers reads them at both ends."""

import json

import pytest
from transformers import AutoConfig, GenerationConfig

from ckpt.conftest import FAMILIES as SIZES
from mt_ckpt.conversion.convert import convert
from mt_ckpt.huggingface.families import FAMILIES
from mt_core.checkpoint.detection import open_checkpoint

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_ids(path):
    """Ids in transformers' model configuration, and in its settings of generation if there are any."""
    configs = [AutoConfig.from_pretrained(path)]
    if (path / "generation_config.json").exists():
        configs.append(GenerationConfig.from_pretrained(path))
    return [{name: getattr(config, name, None) for name in IDS} for config in configs]


@pytest.mark.parametrize("between", ["native", "core"])
@pytest.mark.parametrize(
    "ids",
    [(5, [2, 7], 0), (None, 7, None), ([2, 7][0], [9], 60)],
    ids=["list", "end alone", "list of one"],
)
def test_ids_of_config_json_survive_without_a_tokenizer(ids, between, save_model, tmp_path):
    path = save_model("llama", **dict(zip(IDS, ids, strict=True)))
    (path / "generation_config.json").unlink()
    convert("hf", path, between, tmp_path / "between")
    convert(between, tmp_path / "between", "hf", tmp_path / "hf")
    before, after = read_ids(path), read_ids(tmp_path / "hf")
    assert after[0] == before[0] == dict(zip(IDS, ids, strict=True))
    assert after[-1] == before[0]


def test_settings_of_generation_may_have_other_ids(save_model, tmp_path):
    path = save_model("llama", bos_token_id=1, eos_token_id=2, pad_token_id=3)
    settings = {"eos_token_id": [2, 9], "temperature": 0.6, "do_sample": True}
    (path / "generation_config.json").write_text(json.dumps(settings))
    convert("hf", path, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf")
    assert read_ids(tmp_path / "hf") == read_ids(path)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == settings


def test_a_config_json_without_ids_has_those_of_its_family():
    """Transformers takes them where the keys are absent."""
    for name, family in FAMILIES.items():
        theirs = AutoConfig.for_model(name)
        expected = {key: getattr(theirs, key, None) for key in IDS}
        assert {key: family.token_ids.get(key) for key in IDS} == expected, SIZES[name]


def test_absent_ids_are_the_familys_and_null_ones_are_none(save_model, tmp_path):
    path = save_model("gemma")
    (path / "generation_config.json").unlink()
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k not in IDS} | {"pad_token_id": None})
    )
    convert("hf", path, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf")
    assert read_ids(tmp_path / "hf")[0] == read_ids(path)[0]


def test_the_ids_travel_only_where_the_settings_of_generation_lack_them(save_model):
    path = save_model("llama")
    assert [file.name for file in open_checkpoint(path).tokenizer_files()] == ["generation_config.json"]
