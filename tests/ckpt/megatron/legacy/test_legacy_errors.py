"""What is wrong with a checkpoint of Megatron's old classes is told at once and by name, and nothing of it is run."""

import os
import re
import shutil

import pytest
import torch

from ckpt.megatron.legacy.legacy_checkpoints import arguments, random_weights, write_legacy
from ckpt.megatron.legacy.test_legacy_loader import GPT2, LLAMA
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.legacy.loader import MegatronLegacyLoader
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_cli.main import main
from mt_core.checkpoint.detection import detect_loader
from mt_core.errors import MtError

FILE = "model_optim_rng.pt"


@pytest.fixture
def old(tmp_path):
    """`old(ranks=(2, 2, 1))` → the release's directory of a GPT-2."""

    def make(config=GPT2, **options):
        return write_legacy(tmp_path / "old", config, random_weights(config), **options) / "release"

    return make


def edit(path, change):
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def found(raised):
    return [problem.actual for problem in raised.value.problems]


class Touches:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_pickle_is_refused_and_not_run(old, tmp_path):
    directory = old()
    edit(directory / "mp_rank_00" / FILE, lambda state: state.update(args=Touches(tmp_path / "victim")))
    with pytest.raises(MtError, match=r"its pickle wants to use posix\.system; nothing was run"):
        MegatronLegacyLoader(directory)
    assert detect_loader(directory) == "legacy"
    assert not (tmp_path / "victim").exists()


def test_ranks_and_versions_that_do_not_fit_are_told_together(old):
    directory = old(ranks=(2, 2, 1))
    shutil.rmtree(directory / "mp_rank_01_001")
    shutil.copytree(directory / "mp_rank_00_000", directory / "mp_rank_02_000")
    edit(directory / "mp_rank_01_000" / FILE, lambda state: state.update(checkpoint_version=2.0))
    edit(directory / "mp_rank_00_001" / FILE, lambda state: state.pop("model"))
    with pytest.raises(MtError, match="the checkpoint is of 2 tensor ranks and 2 stages: copy it") as raised:
        MegatronLegacyLoader(directory)
    problems = {problem.where.split("/")[-2]: problem.actual for problem in raised.value.problems}
    assert problems == {
        "mp_rank_01_001": "missing",
        "mp_rank_02_000": "one too many",
        "mp_rank_01_000": "checkpoint_version is 2.0",
        "mp_rank_00_001": "holds no model",
    }


def test_an_unknown_version_is_refused(old):
    with pytest.raises(MtError, match=re.escape("checkpoint_version is 4.0; known: 0.0, 1.0, 2.0, 3.0")):
        MegatronLegacyLoader(old(version=4.0))


def test_ranks_of_other_chunks_are_told(old):
    directory = old(ranks=(2, 2, 2))
    edit(directory / "mp_rank_01_000" / FILE, lambda state: state.pop("model1"))
    with pytest.raises(MtError, match="holds model0, others model0, model1"):
        MegatronLegacyLoader(directory)


def test_a_directory_without_files_is_told(old):
    directory = old()
    (directory / "mp_rank_00" / FILE).unlink()
    with pytest.raises(MtError, match=r"holds no mp_rank_\*/model_optim_rng.pt"):
        MegatronLegacyLoader(directory)


@pytest.mark.parametrize(
    ("changes", "heads", "message"),
    [
        ({"num_attention_heads": 3, "kv_channels": None}, None, "3 attention heads in a hidden_size of 32; a divisor"),
        ({"num_attention_heads": 3}, None, "3 attention heads on 2 tensor ranks; a multiple of 2"),
        ({}, 8, "--num-attention-heads 8, but args say 4; leave the option out"),
        ({"num_experts": 4}, None, "args.num_experts is 4; only None is implemented for the old classes"),
        ({"retro_add_retriever": True}, None, "args.retro_add_retriever is True; only False"),
    ],
)
def test_args_that_do_not_fit_are_told(changes, heads, message, old):
    args = arguments(GPT2, 3.0, (2, 1, 1), 64)
    vars(args).update(changes)
    with pytest.raises(MtError, match=re.escape(message)):
        MegatronLegacyLoader(old(ranks=(2, 1, 1), args=args), num_attention_heads=heads)


def test_grouped_queries_before_version_2_are_refused(old):
    directory = old(LLAMA)
    edit(directory / "mp_rank_00" / FILE, lambda state: state.update(checkpoint_version=1.0))
    with pytest.raises(MtError, match="grouped queries in checkpoint version 1.0; none before version 2.0"):
        MegatronLegacyLoader(directory)


def test_args_and_shapes_that_differ_are_told_together(old):
    args = arguments(GPT2, 3.0, (2, 1, 1), 64)
    args.ffn_hidden_size, args.num_layers, args.swiglu = 48, 5, False
    directory = old(ranks=(2, 1, 1), args=args)
    edit(directory / "mp_rank_01" / FILE, lambda state: state["model"].update(extra={"bias": torch.ones(3)}))
    with pytest.raises(MtError) as raised:
        dict(MegatronLegacyLoader(directory).tensors())
    assert set(found(raised)) == {
        "unexpected tensor",
        "stored by 0 ranks",
        "has shape (32, 32) on tensor rank 0",
        "has shape (32, 32) on tensor rank 1",
        "has shape (32,) on tensor rank 0",
        "has shape (32,) on tensor rank 1",
    }
    assert {p.where.split(": ")[1] for p in raised.value.problems if p.actual == "unexpected tensor"} == {"extra.bias"}
    assert sum("decoder.layers.4." in problem.where for problem in raised.value.problems) == 12


def test_a_tensor_under_two_names_is_told(old):
    directory = old()

    def change(state):
        model = state["model"]["language_model"]
        model["transformer"] = {"layers.0.input_layernorm.weight": model["encoder"]["layers.0.input_norm.weight"]}

    edit(directory / "mp_rank_00" / FILE, change)
    with pytest.raises(MtError, match="transformer.layers.0.input_layernorm.weight: unexpected tensor"):
        dict(MegatronLegacyLoader(directory).tensors())


def test_files_without_args_and_embedding_are_refused(old):
    directory = old(args=None)
    edit(directory / "mp_rank_00" / FILE, lambda state: state["model"]["language_model"].pop("embedding"))
    with pytest.raises(MtError, match="args.hidden_size is None") as raised:
        MegatronLegacyLoader(directory, num_attention_heads=4).config()
    assert "args.padded_vocab_size is None" in found(raised)


def test_an_embedding_that_differs_from_its_copy_is_refused(old):
    directory = old(ranks=(1, 2, 1))
    edit(directory / "mp_rank_00_001" / FILE, lambda s: s["model"]["word_embeddings_for_head"]["weight"].add_(1))
    with pytest.raises(MtError, match="copy of the embedding differs"):
        dict(MegatronLegacyLoader(directory).tensors())


def test_files_without_args_and_positions_are_refused(old):
    directory = old(LLAMA, args=None)
    with pytest.raises(MtError, match="args.position_embedding_type is 'unknown without args'"):
        MegatronLegacyLoader(directory, num_attention_heads=4).config()


def test_files_of_the_other_loader_are_told(old, tmp_path):
    directory = old()
    convert("legacy", directory, "core", tmp_path / "core")
    with pytest.raises(MtError, match="holds no language_model, as the old classes do; use --loader core"):
        MegatronLegacyLoader(tmp_path / "core")
    with pytest.raises(MtError, match="holds Megatron's old classes; use --loader legacy"):
        MegatronCoreLoader(directory)


def test_the_command_exits_with_2_and_leaves_nothing(old, tmp_path, capsys, monkeypatch):
    options = ["--load-dir", str(old(version=9)), "--saver", "native", "--save-dir", str(tmp_path / "native")]
    monkeypatch.setattr("sys.argv", ["mt", "ckpt", "convert", *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "mt: " in (message := capsys.readouterr().err)
    assert "checkpoint_version is 9" in message
    assert not (tmp_path / "native").exists()
