"""Adapters from `mt train` to a model that others load: trained, evaluated, merged, and in the format of peft."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.config.trainable import is_trainable
from mt_core.errors import MtError
from mt_models.config.lora import ADAPTERS
from tiny import byte_corpus, metrics

pytestmark = pytest.mark.slow

TOKENS_BT = torch.arange(60).view(2, 30)
RUN = """
[checkpoint]
init = "hf:{source}"
[model.lora]
rank = 4
alpha = 8
targets = ["q", "k", "v", "out", "gate", "up", "down"]
[data]
paths = ["{corpus}"]
seq_length = 32
split = "90,10,0"
tokenizer.type = "bytes"
[train]
steps = 12
[batch]
micro_batch = 2
global_batch = 4
[optim]
lr = 0.02
[runtime]
run_dir = "{run}"
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama without a tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 256}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=257, max_position_embeddings=64, **ids)
    folder = tmp_path_factory.mktemp("source") / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory, source) -> Path:
    """A run of twelve steps on two tensor ranks."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("run")
    corpus = byte_corpus(folder / "bytes_text_document", files=6)
    toml = folder / "run.toml"
    toml.write_text(RUN.format(source=source, corpus=corpus, run=folder / "run"))
    command = [sys.executable, "-m", "mt_cli", "train", str(toml), "--nproc", "2", "--set", "parallel.tensor=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_only_adapters_move_and_they_learn(source, trained):
    before, after = dict(open_checkpoint(source).tensors()), dict(open_checkpoint(trained).tensors())
    assert {name for name in after if not is_trainable(name, [ADAPTERS])} == before.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    adapters = {name: tensor for name, tensor in after.items() if name not in before}
    assert len(adapters) == 2 * 7 * 2
    assert all(tensor.any() for tensor in adapters.values())
    losses = [line["loss"] for line in metrics(trained)]
    assert losses[-1] < losses[0] - 0.1
    with (trained / "config.toml").open("rb") as file:
        assert tomllib.load(file)["model"]["lora"]["rank"] == 4


def test_merged_they_are_a_plain_model_of_transformers(trained, tmp_path):
    done = convert("native", trained, "hf", tmp_path / "merged", merge_lora=True, verify=True)
    assert len(done.comparisons) == 2
    unmerged = our_logits(open_checkpoint(trained), TOKENS_BT)
    torch.testing.assert_close(transformers_logits(tmp_path / "merged", TOKENS_BT), unmerged, rtol=1e-5, atol=1e-5)
    assert "lora" not in (tmp_path / "merged" / "config.json").read_text()


def test_peft_loads_the_adapters_alone(source, trained, tmp_path):
    peft = pytest.importorskip("peft")
    convert("native", trained, "peft", tmp_path / "adapters", options={"base_model_name": str(source)})
    assert sorted(file.name for file in (tmp_path / "adapters").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapters").eval()
    with torch.inference_mode():
        logits_BTV = adapted(TOKENS_BT).logits
    torch.testing.assert_close(logits_BTV, our_logits(open_checkpoint(trained), TOKENS_BT), rtol=1e-5, atol=1e-5)
    settings = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(source)


def test_a_native_copy_keeps_the_adapters_and_other_formats_refuse_them(source, trained, tmp_path):
    convert("native", trained, "native", tmp_path / "copy")
    assert open_checkpoint(tmp_path / "copy").config() == open_checkpoint(trained).config()
    for saver, message in (("hf", "cannot carry .*lora"), ("core", "lora"), ("legacy", "lora")):
        with pytest.raises(MtError, match=message):
            convert("native", trained, saver, tmp_path / saver)
        assert not (tmp_path / saver).exists()
    with pytest.raises(MtError, match="--merge-lora: .* has no adapters; leave the option out"):
        convert("hf", source, "native", tmp_path / "none", merge_lora=True)
    with pytest.raises(MtError, match="saver peft: the model has no adapters"):
        convert("hf", source, "peft", tmp_path / "none")
    with pytest.raises(MtError, match="--verify: adapters alone compute no logits"):
        convert("native", trained, "peft", tmp_path / "none", verify=True)
    assert not (tmp_path / "none").exists()
