"""Checkpoints of Megatron's old classes are read whole and exactly, whatever their version, age and layout."""

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ckpt.conftest import hugging_face_model
from ckpt.megatron.legacy.legacy_checkpoints import arguments, random_weights, write_legacy
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.verify import our_logits
from mt_ckpt.huggingface.loader import HuggingFace
from mt_ckpt.megatron.legacy.loader import MegatronLegacyLoader
from mt_ckpt.megatron.legacy.versions import arrangement
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.errors import MtError
from tiny import gpt2, llama

GPT2 = gpt2(layers=4, vocab_size=61, vocab_divisor=8)
LLAMA = llama(layers=4, vocab_size=61, vocab_divisor=8)


def same(tensors, expected):
    tensors = dict(tensors)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("version", "stored"),
    [
        (0.0, "q00 q01 q10 q11 k00 k01 k10 k11 v00 v01 v10 v11"),
        (1.0, "q00 k00 v00 q01 k01 v01 q10 k10 v10 q11 k11 v11"),
        (2.0, "q00 q01 k00 k01 v00 v01 q10 q11 k10 k11 v10 v11"),
        (3.0, "q00 q01 k00 k01 v00 v01 q10 q11 k10 k11 v10 v11"),
    ],
)
def test_rows_of_each_version_come_into_the_order_of_today(version, stored):
    """By hand: the letter of a row, its head, its number there."""
    numbers = {name: float(n) for n, name in enumerate(stored.split())}
    arrange, bias = arrangement(version, heads=2), torch.tensor([*numbers.values()])
    today = ["q00", "q01", "k00", "k01", "v00", "v01", "q10", "q11", "k10", "k11", "v10", "v11"]
    expected = torch.tensor([numbers[name] for name in today])
    assert torch.equal(arrange("decoder.layers.7.self_attention.linear_qkv.bias", bias), expected)
    weight = bias[:, None].expand(-1, 3)
    arranged = arrange("decoder.layers.7.self_attention.linear_qkv.weight", weight)
    assert torch.equal(arranged, expected[:, None].expand(-1, 3))
    assert arrange("decoder.layers.7.mlp.linear_fc1.bias", bias) is bias


@pytest.mark.parametrize(
    ("version", "style", "ranks"),
    [
        (None, "2019", (1, 1, 1)),
        (0, "2019", (2, 1, 1)),
        (1.0, "2019", (2, 2, 1)),
        (2.0, "2021", (4, 2, 1)),
        (3.0, "2021", (2, 2, 2)),
        (3.0, "2023", (1, 4, 1)),
        (3.0, "engine", (2, 1, 1)),
    ],
    ids=str,
)
def test_every_version_and_layout_gives_the_weights(version, style, ranks, tmp_path):
    weights = random_weights(GPT2, torch.bfloat16)
    loader = MegatronLegacyLoader(
        write_legacy(tmp_path, GPT2, weights, version=version, style=style, ranks=ranks), true_vocab_size=61
    )
    assert same(loader.tensors(), weights)
    assert loader.config() == GPT2.model_copy(update={"vocab_divisor": 128})


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 2, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_rope_swiglu_rmsnorm_and_grouped_queries_are_read(tied, ranks, tmp_path):
    config = LLAMA.model_copy(update={"tied": tied})
    weights = random_weights(config)
    loader = MegatronLegacyLoader(write_legacy(tmp_path, config, weights, ranks=ranks), true_vocab_size=61)
    assert same(loader.tensors(), weights)
    assert loader.config() == config.model_copy(update={"vocab_divisor": 128})


@pytest.mark.parametrize("version", [None, 0.0, 1.0, 2.0, 3.0])
def test_the_logits_are_those_of_gpt2_in_transformers(version, tmp_path):
    model = hugging_face_model("gpt2")
    model.save_pretrained(tmp_path / "hf")
    source = HuggingFace(tmp_path / "hf")
    root = write_legacy(tmp_path / "old", source.config(), dict(source.tensors()), version=version, ranks=(2, 1, 1))
    tokens_BT = torch.arange(2 * 24).view(2, 24) % 61
    with torch.no_grad():
        reference_BTV = model(tokens_BT).logits
    torch.testing.assert_close(
        our_logits(MegatronLegacyLoader(root, true_vocab_size=61), tokens_BT), reference_BTV, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_files_without_args_need_the_number_of_heads_alone(zipped, tmp_path, capsys):
    """Files of NVIDIA's NGC: the sizes follow from shapes, GELU is the tanh approximation."""
    weights = random_weights(GPT2, torch.float16)
    root = write_legacy(tmp_path, GPT2, weights, version=None, style="2019", args=None, zipped=zipped)
    with pytest.raises(
        MtError, match="nothing says how many attention heads there are; convert it with --num-attention-heads"
    ):
        MegatronLegacyLoader(root)
    loader = MegatronLegacyLoader(root, num_attention_heads=4, true_vocab_size=61)
    assert loader.config() == GPT2.model_copy(update={"vocab_divisor": 128})
    assert same(loader.tensors(), weights)
    assert "no args; sizes are those of the tensors, the activation tanh-GELU" in capsys.readouterr().err


def test_files_without_args_may_be_cut_and_untied(tmp_path):
    config = GPT2.model_copy(update={"tied": False})
    weights = random_weights(config)
    root = write_legacy(tmp_path, config, weights, version=2.0, style="2021", ranks=(2, 2, 1), args=None)
    loader = MegatronLegacyLoader(root, num_attention_heads=4, true_vocab_size=61)
    assert not loader.config().tied
    assert same(loader.tensors(), weights)


def test_the_command_converts_a_file_without_args(tmp_path):
    root = write_legacy(tmp_path / "ngc", GPT2, random_weights(GPT2), version=None, style="2019", args=None)
    options = ["--num-attention-heads", 4, "--true-vocab-size", 61, "--verify"]
    result = mt_ckpt("convert", "--load-dir", root, "--saver", "hf", "--save-dir", tmp_path / "hf", *options)
    assert result.exit_code == 0
    assert "verified: result in mt = result in transformers" in result.stdout


@pytest.mark.parametrize("kind", [argparse.Namespace, SimpleNamespace])
@pytest.mark.parametrize(("file", "tracker"), [("model_rng.pt", "release"), ("model_optim_rng.pt", "20")])
def test_files_are_found_under_either_name(kind, file, tracker, tmp_path):
    args = kind(**vars(arguments(GPT2, 3.0, (2, 1, 1), 64)))
    weights = random_weights(GPT2)
    root = write_legacy(tmp_path, GPT2, weights, ranks=(2, 1, 1), args=args, file=file, tracker=tracker)
    assert same(MegatronLegacyLoader(root, true_vocab_size=61).tensors(), weights)
    iteration = root / ("release" if tracker == "release" else "iter_0000020")
    assert detect_loader(root) == detect_loader(iteration) == "legacy"


def test_ranks_beside_a_distributed_optimizer_are_found(tmp_path):
    """Each data rank had a directory then; those beyond the first hold copies."""
    weights = random_weights(GPT2)
    root = write_legacy(tmp_path, GPT2, weights, file="model_rng.pt")
    for data_rank in range(2):
        directory = root / "release" / f"mp_rank_00_{data_rank:03d}"
        directory.mkdir()
        os.link(root / "release" / "mp_rank_00" / "model_rng.pt", directory / "model_rng.pt")
    (root / "release" / "mp_rank_00" / "model_rng.pt").unlink()
    assert same(MegatronLegacyLoader(root, true_vocab_size=61).tensors(), weights)


def test_settings_that_old_args_spell_otherwise_are_understood(tmp_path):
    args = arguments(LLAMA, 3.0, (1, 1, 1), 64)
    del args.position_embedding_type, args.max_position_embeddings
    args.use_rotary_position_embeddings, args.num_experts, args.max_position_embeddings = True, [1], 64
    root = write_legacy(tmp_path, LLAMA, random_weights(LLAMA), args=args)
    assert MegatronLegacyLoader(root, true_vocab_size=61).config().position == LLAMA.position


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_loss_scalers_of_old_packages_are_inert(zipped, tmp_path):
    """Files of 2019 hold one; its class exists while the file is written, and not when it is read."""
    module = ModuleType("fp16.loss_scaler")
    sys.modules |= {"fp16": ModuleType("fp16"), "fp16.loss_scaler": module}
    module.Scaler = type("Scaler", (), {"__module__": "fp16.loss_scaler"})
    weights, args = random_weights(GPT2), arguments(GPT2, 0, (1, 1, 1), 64)
    args.scaler = module.Scaler()
    args.scaler.scale = 2
    try:
        root = write_legacy(tmp_path, GPT2, weights, version=0, style="2019", args=args, zipped=zipped)
    finally:
        del sys.modules["fp16.loss_scaler"], sys.modules["fp16"]
    loader = MegatronLegacyLoader(root, true_vocab_size=61)
    assert loader.args.scaler.scale == 2
    assert same(loader.tensors(), weights)


def test_tensors_stay_in_the_file_until_they_are_asked_for(tmp_path):
    root = write_legacy(tmp_path, GPT2, random_weights(GPT2))
    loader = MegatronLegacyLoader(root)
    assert str(root / "release" / "mp_rank_00" / "model_optim_rng.pt") in Path("/proc/self/maps").read_text()
    assert loader.config().layers == 4


def test_the_loader_is_told_from_the_files(tmp_path):
    root = write_legacy(tmp_path, GPT2, random_weights(GPT2))
    assert isinstance(open_checkpoint(root), MegatronLegacyLoader)
    assert not isinstance(open_checkpoint(root), MegatronCoreLoader)
