"""What is written for Megatron's old classes: names and nesting, args, and the same bits back.

Source: docs/specs/checkpoints.md §1.2, §3.1.
"""

import argparse
import re

import pytest
import torch

from ckpt.megatron.legacy.legacy_checkpoints import random_weights, write_legacy
from ckpt.megatron.legacy.test_legacy_loader import GPT2, LLAMA, same
from ckpt.megatron.test_round_trip import read_tensors, sizes
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.legacy.saver import save
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.checkpoint.native import write_model
from mt_core.errors import MtError

FILE = "model_optim_rng.pt"


def native(config, path, dtype=torch.float32):
    write_model(path, config.model_dump(mode="json"), random_weights(config, dtype).items())
    return path


def contents(path):
    return torch.load(path, weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 4, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_layout_gives_the_same_bits_back(config, layout, tmp_path):
    source = native(config, tmp_path / "native")
    convert("native", source, "legacy", tmp_path / "old", options=sizes(*layout))
    convert("legacy", tmp_path / "old", "native", tmp_path / "back")
    convert("native", tmp_path / "back", "legacy", tmp_path / "again", options=sizes(*layout))
    assert read_tensors(tmp_path / "old") == read_tensors(tmp_path / "back") == read_tensors(source)
    assert open_checkpoint(tmp_path / "back").config() == config
    files = sorted(path.relative_to(tmp_path / "old") for path in (tmp_path / "old").rglob("*") if path.is_file())
    assert len(files) == layout[0] * layout[1] + 1
    assert all((tmp_path / "old" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)


def test_the_files_are_those_that_the_specification_gives(tmp_path):
    """Contents equal those of the tests' own writer, which knows the specification alone; padding repeats a row."""
    config, ranks = GPT2.model_copy(update={"vocab_size": 64}), (2, 2, 2)
    expected = write_legacy(tmp_path / "expected", config, random_weights(config), ranks=ranks)
    convert("native", native(config, tmp_path / "native"), "legacy", tmp_path / "old", options=sizes(*ranks))
    for path in sorted((expected / "release").glob("*/*")):
        written = contents(tmp_path / "old" / path.relative_to(expected))
        for chunk in ("model0", "model1"):
            assert same(flat(written[chunk]), dict(flat(contents(path)[chunk])))
        assert (written["checkpoint_version"], written["iteration"]) == (3.0, 0)
    assert (tmp_path / "old" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert detect_loader(tmp_path / "old") == "legacy"


def flat(tree, prefix=""):
    for name, value in tree.items():
        yield from flat(value, f"{prefix}{name}|") if isinstance(value, dict) else [(prefix + name, value)]


def test_args_are_what_megatron_compares_and_its_weights_only_list_takes(tmp_path):
    convert("native", native(LLAMA, tmp_path / "native", torch.bfloat16), "legacy", tmp_path / "old", options=sizes(2))
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / "old" / "release" / "mp_rank_01" / FILE, weights_only=True)
    wanted = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "add_position_embedding": False,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 8,
        "padded_vocab_size": 64,
        "tokenizer_type": None,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "data_parallel_random_init": False,
        "consumed_train_samples": 0,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
        "params_dtype": torch.bfloat16,
        "use_legacy_models": True,
    }
    assert {name: getattr(state["args"], name) for name in wanted} == wanted


def test_padding_repeats_the_last_row(tmp_path):
    convert("native", native(GPT2, tmp_path / "native"), "legacy", tmp_path / "old")
    state = contents(tmp_path / "old" / "release" / "mp_rank_00" / FILE)
    words = state["model"]["language_model"]["embedding"]["word_embeddings"]["weight"]
    assert words.shape == (64, 32)
    assert (words[60:] == words[60]).all()


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, sizes(4), "attention.num_kv_heads = 2 for 4 tensor ranks; whole groups on each rank, or --saver core"),
        ({}, sizes(3), "saver legacy: attention.heads = 4 does not divide by 3 tensor ranks"),
        ({}, sizes(0), "--target-tensor-parallel-size is below 1"),
        ({}, sizes(1, 3), "4 layers do not divide by 3 stages of 1 chunks"),
        (
            {"mlp": {"kind": "gated", "ffn_hidden_size": 20, "bias": True}},
            {},
            "saver legacy: cannot carry mlp.bias = True",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(changes, options, message, tmp_path):
    config = type(LLAMA).model_validate(LLAMA.model_dump() | changes)
    with pytest.raises(MtError, match=re.escape(message)):
        save(tmp_path / "old", config, (), **options)
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": {"kind": "moe", "ffn_hidden_size": 8, "experts": 4, "top_k": 2}},
        {"attention": LLAMA.attention.model_dump() | {"qk_norm": True}},
        {"attention": LLAMA.attention.model_dump() | {"window": 8}},
    ],
    ids=["experts", "norms of queries", "window"],
)
def test_what_the_old_classes_have_not_is_refused(changes, tmp_path):
    config = type(LLAMA).model_validate(LLAMA.model_dump() | changes)
    with pytest.raises(MtError, match="saver legacy: (cannot carry|the old classes have no)"):
        save(tmp_path / "old", config, ())
