"""Hugging Face → native → Hugging Face: the same bits, the same logits in transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ckpt.conftest import bits, hugging_face_model
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits, transformers_logits
from mt_ckpt.huggingface.saver import save
from mt_ckpt.tensor_streams.safetensors_directory import INDEX
from mt_core.checkpoint.detection import open_checkpoint

CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama theta, wide heads": (
        "llama",
        {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    ),
    "mistral": ("mistral", {"head_dim": 12}),
    "mistral odd heads": ("mistral", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}),
    "gpt2": ("gpt2", {}),
    "gpt2 untied relu": ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu", "n_inner": 50}),
}
TOKENS_BT = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))


def round_trip(path, tmp_path):
    convert("hf", path, "native", tmp_path / "native")
    convert("native", tmp_path / "native", "hf", tmp_path / "hf")
    return tmp_path / "native", tmp_path / "hf"


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
@pytest.mark.parametrize(("family", "changes"), CASES.values(), ids=list(CASES))
def test_bits_and_logits_survive(family, changes, shard, save_model, tmp_path):
    source = save_model(family, shard=shard, **changes)
    native, result = round_trip(source, tmp_path)
    assert bits(result) == bits(source)
    expected_BTV = transformers_logits(source, TOKENS_BT)
    for ours in (source, native, result):
        assert (our_logits(open_checkpoint(ours), TOKENS_BT) - expected_BTV).abs().max() <= 1e-5
    assert torch.equal(transformers_logits(result, TOKENS_BT), expected_BTV)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bf16_stays_bf16(family, save_model, tmp_path):
    source = save_model(family, dtype=torch.bfloat16)
    _, result = round_trip(source, tmp_path)
    assert bits(result) == bits(source)
    assert {dtype for dtype, _, _ in bits(result).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(result, dtype="auto").dtype == torch.bfloat16


def test_tied_weights_are_left_out(save_model, tmp_path):
    _, result = round_trip(save_model("llama", tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in bits(result)


def test_a_second_round_trip_changes_no_file(save_model, tmp_path):
    _, first = round_trip(save_model("gpt2"), tmp_path)
    (tmp_path / "again").mkdir()
    _, second = round_trip(first, tmp_path / "again")
    assert {f.name: f.read_bytes() for f in first.iterdir()} == {f.name: f.read_bytes() for f in second.iterdir()}


def test_large_models_are_written_in_shards_that_transformers_reads(save_model, tmp_path):
    loader = open_checkpoint(save_model("gpt2"))
    save(tmp_path / "shards", loader.config(), loader.tensors(), shard_bytes=30_000)
    files = sorted(f.name for f in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "shards" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in bits(tmp_path / "shards").values())
    assert bits(tmp_path / "shards") == bits(loader.path)
    assert torch.equal(transformers_logits(tmp_path / "shards", TOKENS_BT), transformers_logits(loader.path, TOKENS_BT))


def test_gpt2_as_first_published_is_read(save_model):
    """Names without `transformer.`, the causal mask stored as a buffer, sparse config.json."""
    path = save_model("gpt2")
    expected_BTV = transformers_logits(path, TOKENS_BT)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(path / "model.safetensors").items()}
    tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 40, 40).tril() for n in range(3)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    keep = ("model_type", "n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "activation_function")
    (path / "config.json").write_text(json.dumps({key: raw[key] for key in keep}))
    assert (our_logits(open_checkpoint(path), TOKENS_BT) - expected_BTV).abs().max() <= 1e-5


def test_the_models_differ_when_a_weight_does(save_model):
    """The comparisons above can fail."""
    path = save_model("llama")
    file = path / "model.safetensors"
    before_BTV = our_logits(open_checkpoint(path), TOKENS_BT)
    tensors = load_file(file)
    tensors["model.layers.1.self_attn.k_proj.weight"] *= 1.01
    save_file(tensors, file, {"format": "pt"})
    assert (our_logits(open_checkpoint(path), TOKENS_BT) - before_BTV).abs().max() > 1e-5


def test_the_source_model_and_the_saved_one_agree(save_model):
    """The fixture's files are what transformers computes with."""
    logits_BTV = hugging_face_model("llama")(TOKENS_BT).logits
    assert torch.equal(transformers_logits(save_model("llama"), TOKENS_BT), logits_BTV.detach())
