"""Safetensors directories, whole and damaged."""

import json
import pickle
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from mt_ckpt.tensor_streams.sources import INDEX, SINGLE, SafetensorsDir
from mt_core.errors import MtError


@pytest.fixture
def shards(save_model):
    path = save_model("llama", shard="30KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


def test_one_file_is_read(save_model):
    path = save_model("llama")
    tensors = dict(SafetensorsDir(path).tensors())
    expected = load_file(path / SINGLE)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_shards_are_read(shards):
    tensors = dict(SafetensorsDir(shards).tensors())
    assert tensors.keys() == json.loads((shards / INDEX).read_text())["weight_map"].keys()


def test_headers_give_shapes_without_data(save_model):
    tensor = dict(SafetensorsDir(save_model("llama")).headers())["lm_head.weight"]
    assert (tensor.shape, tensor.device.type) == ((61, 32), "meta")


def test_every_damaged_shard_is_named_at_once(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-10])
    with pytest.raises(MtError) as error:
        SafetensorsDir(shards)
    assert [p.where for p in error.value.problems] == [str(first), str(second)]
    assert "missing" in error.value.problems[0].actual
    assert "truncated or not safetensors" in error.value.problems[1].actual


def test_a_file_cut_within_its_header_is_named(save_model):
    path = save_model("llama")
    (path / SINGLE).write_bytes((path / SINGLE).read_bytes()[:100])
    with pytest.raises(MtError, match=r"model\.safetensors: truncated or not safetensors"):
        SafetensorsDir(path)


def test_a_tensor_that_its_shard_lacks_is_named(shards):
    edit_index(
        shards, lambda index: index["weight_map"].update({"model.extra.weight": max(index["weight_map"].values())})
    )
    with pytest.raises(MtError, match=r"has no tensor model\.extra\.weight; model\.safetensors\.index\.json says"):
        SafetensorsDir(shards)


def test_an_index_that_leads_out_of_the_directory_is_refused(shards):
    edit_index(shards, lambda index: index["weight_map"].update({"a": "../../secret.safetensors"}))
    with pytest.raises(MtError, match=r"puts a into '\.\./\.\./secret\.safetensors'; a plain file name"):
        SafetensorsDir(shards)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not JSON"), ("[]", "not a JSON object"), ("{}", "has no weight_map")]
)
def test_a_damaged_index_is_named(shards, text, message):
    (shards / INDEX).write_text(text)
    with pytest.raises(MtError, match=rf"{re.escape(INDEX)}: {message}"):
        SafetensorsDir(shards)


class Malicious:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (self.mark, "w"))


def test_pickled_weights_are_refused_and_not_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(str(tmp_path / "ran"))))
    with pytest.raises(
        MtError, match=r"only pickled weights \(pytorch_model\.bin\).*not opened; save it as safetensors"
    ):
        SafetensorsDir(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_a_safetensors_name_is_refused_and_not_run(tmp_path):
    (tmp_path / SINGLE).write_bytes(pickle.dumps(Malicious(str(tmp_path / "ran"))))
    with pytest.raises(MtError, match="truncated or not safetensors"):
        SafetensorsDir(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(MtError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        SafetensorsDir(tmp_path)


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(MtError, match="nowhere: no such directory"):
        SafetensorsDir(tmp_path / "nowhere")


def test_a_tensor_that_no_index_names_is_still_seen(shards):
    file = min(shards.glob("*.safetensors"))
    save_file({**load_file(file), "extra": torch.zeros(1)}, file, {"format": "pt"})
    assert "extra" in dict(SafetensorsDir(shards).tensors())
