"""Conversion: every tensor accounted for, nothing half-written, proof on request."""

import json
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

from mt_ckpt.conversion.convert import convert
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

WEIGHTS = "model.safetensors"


def edit(path, change):
    """Rewrite the source's tensors through `change`, a function that edits their dict in place."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


def problems(*args, **kwargs):
    with pytest.raises(MtError) as error:
        convert(*args, **kwargs)
    return [str(problem) for problem in error.value.problems]


def is_clean(directory):
    """No result and no temporary left-over."""
    return [path.name for path in directory.iterdir() if "result" in path.name] == []


def test_it_tells_what_it_did(save_model, tmp_path):
    path = save_model("llama")
    done = convert("llama_mistral", path, "native", tmp_path / "result")
    tensors = load_file(path / WEIGHTS)
    assert (done.tensors, done.parameters) == (len(tensors), sum(t.numel() for t in tensors.values()))
    assert done.bytes == 4 * done.parameters
    assert done.comparisons == ()


def test_native_to_native_keeps_config_and_bits(native, tmp_path):
    convert("native", native, "native", tmp_path / "result")
    before, after = open_checkpoint(native), open_checkpoint(tmp_path / "result")
    assert after.config() == before.config()
    expected = dict(before.tensors())
    assert all(torch.equal(tensor, expected.pop(name)) for name, tensor in after.tensors())
    assert expected == {}


def test_missing_unexpected_and_misshapen_tensors_of_a_file_are_told_at_once(save_model, tmp_path):
    path = save_model("llama")

    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(48, 32)
        tensors["lm_head.weight"] = torch.zeros(60, 32)

    edit(path, damage)
    reported = problems("hf", path, "native", tmp_path / "result")
    assert len(reported) == 5
    for part in (
        "norm.weight: tensor is missing",
        "layers.1.mlp.up.weight: tensor is missing",
        "model.layers.0.self_attn.sinks: unexpected tensor",
        "layers.7.mlp.up.weight: unexpected tensor",
        "head.weight: tensor has shape (60, 32)",
    ):
        assert any(part in problem and problem.startswith(str(path)) for problem in reported), part
    assert is_clean(tmp_path)


def test_a_tensor_in_two_shards_is_read_if_both_are_equal_and_refused_if_not(save_model, tmp_path):
    path = save_model("llama", shard="30KB")
    first, *_, last = sorted(path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    rest = load_file(last)
    save_file({**rest, name: tensor}, last, {"format": "pt"})
    convert("hf", path, "native", tmp_path / "equal")
    save_file({**rest, name: tensor + 1}, last, {"format": "pt"})
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "is stored twice, and differently" in problem


def test_what_a_third_partys_loader_gets_wrong_is_told_at_once(native, tmp_path, add_component):
    add_component("ckpt-loader", "odd", "ckpt.faulty_plugins:WrongTensors")
    reported = problems("odd", native, "native", tmp_path / "result")
    assert len(reported) == 4
    for part in (
        "layers.1.mlp.up.weight: tensor is missing",
        "layers.0.attn.q.weight: tensor has shape (31, 32)",
        "embed.weight: duplicate tensor (2 copies)",
        "layers.0.attn.sink: unexpected tensor",
    ):
        assert any(part in problem for problem in reported), part
    assert is_clean(tmp_path)


def test_a_fused_tensor_of_the_wrong_width_is_refused(save_model, tmp_path):
    path = save_model("gpt2")
    edit(path, lambda tensors: tensors.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(32, 95)}))
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "layers.0.attn.v.weight: tensor has shape (31, 32)" in problem


def test_a_tied_source_may_carry_an_identical_output_layer(save_model, tmp_path):
    path = save_model("llama", tie_word_embeddings=True)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    convert("hf", path, "hf", tmp_path / "result")
    assert "lm_head.weight" not in load_file(tmp_path / "result" / WEIGHTS)


def test_a_tied_source_with_another_output_layer_is_refused(save_model, tmp_path):
    path = save_model("llama", tie_word_embeddings=True)
    edit(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "differs from the embedding" in problem
    assert "set tie_word_embeddings to false" in problem
    assert is_clean(tmp_path)


def test_an_untied_source_without_an_output_layer_is_refused(save_model, tmp_path):
    path = save_model("llama")
    edit(path, lambda tensors: tensors.pop("lm_head.weight"))
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert "head.weight: tensor is missing" in problem


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_dtype_rounds_every_tensor(name, dtype, save_model, tmp_path):
    path = save_model("gpt2")
    convert("hf", path, "hf", tmp_path / "result", dtype=name, verify=True)
    before, after = load_file(path / WEIGHTS), load_file(tmp_path / "result" / WEIGHTS)
    assert all(torch.equal(after[key], before[key].to(dtype)) for key in before)
    assert json.loads((tmp_path / "result" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_an_unknown_dtype_is_refused(native, tmp_path):
    assert problems("native", native, "hf", tmp_path / "result", dtype="fp8") == [
        "--dtype: unknown name 'fp8'; allowed: fp32, bf16, fp16"
    ]


def test_a_weight_too_large_for_fp16_is_refused(save_model, tmp_path):
    path = save_model("llama")
    edit(path, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    (problem,) = problems("hf", path, "native", tmp_path / "result", dtype="fp16")
    assert "norm.weight: 100000 does not fit float16; use bf16 or fp32" in problem
    assert is_clean(tmp_path)


def test_model_type_refuses_another_kind_of_source(native, tmp_path):
    convert("native", native, "native", tmp_path / "gpt", model_type="GPT")
    (problem,) = problems("native", native, "native", tmp_path / "result", model_type="BERT")
    assert problem == f"--model-type BERT: {native} holds a 'gpt' model; use gpt"


def test_an_existing_target_is_refused_and_kept(native, tmp_path):
    (tmp_path / "result").mkdir()
    (tmp_path / "result" / "precious").write_text("kept")
    with pytest.raises(MtError, match="result: already exists; choose another directory or remove it"):
        convert("native", native, "hf", tmp_path / "result")
    assert (tmp_path / "result" / "precious").read_text() == "kept"


@pytest.mark.parametrize("saver", ["native", "hf"])
def test_an_interrupted_conversion_leaves_nothing(saver, native, tmp_path, add_component):
    add_component("ckpt-loader", "interrupted", "ckpt.faulty_plugins:Interrupted")
    with pytest.raises(KeyboardInterrupt):
        convert("interrupted", native, saver, tmp_path / "result")
    assert is_clean(tmp_path)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("saver", ["native", "hf"])
def test_a_full_disk_is_told_and_leaves_nothing(saver, native, tmp_path):
    with files_no_larger_than(20_000), pytest.raises(MtError, match="the disk is full; free some space and run again"):
        convert("native", native, saver, tmp_path / "result")
    assert is_clean(tmp_path)


def test_verification_compares_every_side(save_model, tmp_path):
    done = convert("hf", save_model("gpt2"), "hf", tmp_path / "result", verify=True)
    assert [(c.left, c.right) for c in done.comparisons] == [
        ("source in transformers", "source in mt"),
        ("source in mt", "result in mt"),
        ("result in mt", "result in transformers"),
    ]
    assert all(c.equal for c in done.comparisons)
    assert done.comparisons[1].difference == 0


def test_verification_of_native_formats_needs_no_transformers(native, tmp_path):
    done = convert("native", native, "native", tmp_path / "result", verify=True)
    assert [(c.left, c.right) for c in done.comparisons] == [("source in mt", "result in mt")]


def test_verification_catches_a_saver_that_mixes_up_meanings(native, tmp_path, add_component):
    add_component("ckpt-saver", "swaps", "ckpt.faulty_plugins:swaps_gate_and_up")
    convert("native", native, "swaps", tmp_path / "unnoticed")
    (problem,) = problems("native", native, "swaps", tmp_path / "result", verify=True)
    assert re.search(r"source in mt and result in mt disagree: logits differ by .* the result was removed", problem)
    assert is_clean(tmp_path)


def test_verification_of_a_format_that_no_loader_reads_is_refused(native, tmp_path, add_component):
    add_component("ckpt-saver", "text", "ckpt.faulty_plugins:writes_text")
    (problem,) = problems("native", native, "text", tmp_path / "result", verify=True)
    assert "holds no checkpoint of a known format; looked for core: " in problem
    assert is_clean(tmp_path)


def test_weights_that_give_nan_do_not_pass_verification(save_model, tmp_path):
    path = save_model("llama")
    edit(path, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    assert any("disagree" in problem for problem in problems("hf", path, "native", tmp_path / "result", verify=True))


def test_llama_mistral_refuses_gpt2(save_model, tmp_path):
    (problem,) = problems("llama_mistral", save_model("gpt2"), "native", tmp_path / "result")
    assert "model_type is 'gpt2'; this loader reads llama, mistral" in problem


def test_a_directory_without_config_json_is_refused(save_model, tmp_path):
    path = save_model("llama")
    (path / "config.json").unlink()
    (problem,) = problems("hf", path, "native", tmp_path / "result")
    assert problem.startswith(f"{path / 'config.json'}: missing")


def test_a_native_checkpoint_without_its_mark_is_refused(native, tmp_path):
    (native / "step-00000000" / "COMMITTED").unlink()
    (problem,) = problems("native", native, "hf", tmp_path / "result")
    assert "COMMITTED" in problem


def test_a_truncated_native_file_is_refused(native, tmp_path):
    file = next((native / "step-00000000" / "model").iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    (problem,) = problems("native", native, "hf", tmp_path / "result")
    assert str(file) in problem
    assert is_clean(tmp_path)
