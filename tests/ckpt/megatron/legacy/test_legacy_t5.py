"""T5 of Megatron's old classes: read from every version, written back, and refused where they are not like ours.

The files are written row by row from the words of docs/specs/checkpoints.md §3.1 and §3.9.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt.megatron.legacy.legacy_checkpoints import STYLES, _layer, arguments, random_weights
from ckpt.megatron.legacy.test_legacy_loader import same
from ckpt.megatron.legacy.test_legacy_saver import contents, flat
from ckpt.megatron.test_encoders import T5 as CONFIG
from ckpt.megatron.test_round_trip import read_tensors, sizes
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.legacy.loader import MegatronLegacyLoader
from mt_ckpt.megatron.legacy.saver import save
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.checkpoint.native import write_model
from mt_core.errors import MtError
from mt_models.config import T5Config

ROWS = 64
T5 = CONFIG.model_copy(update={"vocab_size": ROWS, "vocab_divisor": 32})
DECODER = STYLES["2023"] | {"mlp_norm.": "post_inter_attention_norm.", "cross_norm.": "post_attention_norm."}


def stack(weights: dict[str, Tensor], which: str, version: float | None, t: int, tensor: int) -> dict[str, Tensor]:
    """A stack's flat names on tensor rank `t`."""
    style, tensors = DECODER if which == "decoder" else STYLES["2023"], {}
    for n in range(T5.stack_layers(which)):
        ours, theirs = f"{which}.layers.{n}.", f"layers.{n}."
        for leaf in ("weight", "bias"):
            for name, part in _layer(T5, weights, ours, leaf, version, t, tensor):
                tensors[f"{theirs}{style[name]}{leaf}"] = part
            if which == "decoder":
                cross = {part: weights[f"{ours}cross.{part}.{leaf}"] for part in ("q", "k", "v", "out")}
                tensors[f"{theirs}{style['cross_norm.']}{leaf}"] = weights[f"{ours}cross_norm.{leaf}"]
                tensors[f"{theirs}inter_attention.query.{leaf}"] = cross["q"].chunk(tensor)[t].clone()
                rows = keys_and_values(*(cross[part].chunk(tensor)[t] for part in "kv"), version)
                tensors[f"{theirs}inter_attention.key_value.{leaf}"] = torch.stack(rows)
                out = cross["out"].chunk(tensor, 1)[t].clone() if leaf == "weight" else cross["out"]
                tensors[f"{theirs}inter_attention.dense.{leaf}"] = out
    return tensors | {f"final_norm.{leaf}": weights[f"{which}.norm.{leaf}"] for leaf in ("weight", "bias")}


def keys_and_values(k: Tensor, v: Tensor, version: float | None) -> list[Tensor]:
    """Rows in the order of the version."""
    d = T5.attention.head_size
    if not version:
        return [*k, *v]
    if version == 1.0:
        return [part[row] for row in range(len(k)) for part in (k, v)]
    return [row for head in range(len(k) // d) for part in (k, v) for row in part[head * d : (head + 1) * d]]


def write_t5(root: Path, weights: dict[str, Tensor], *, version: float | None = 3.0, tensor: int = 1) -> Path:
    """A release's files."""
    args = arguments(T5, version, (tensor, 1, 1), ROWS)
    args.kv_channels, args.ffn_hidden_size, args.decoder_num_layers = 6, 20, T5.decoder_layers
    for t in range(tensor):
        embedding = {
            "word_embeddings": {"weight": weights["embed.weight"].chunk(tensor)[t].clone()},
            "position_embeddings": {"weight": weights["position.weight"]},
        }
        stacks = {which: stack(weights, which, version, t, tensor) for which in ("encoder", "decoder")}
        head = {"bias": weights["head.bias"].chunk(tensor)[t].clone()}
        state: dict[str, Any] = {"model": {"language_model": {"embedding": embedding, **stacks}, "lm_head": head}}
        state |= {"args": args, "iteration": 7} | ({} if version is None else {"checkpoint_version": version})
        path = root / "release" / f"mp_rank_{t:02d}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save(state, path)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    return root


@pytest.mark.parametrize(("version", "tensor"), [(None, 1), (1.0, 2), (3.0, 1), (3.0, 2)])
def test_every_version_gives_the_weights(version, tensor, tmp_path):
    weights = random_weights(T5, torch.bfloat16)
    root = write_t5(tmp_path / "old", weights, version=version, tensor=tensor)
    assert detect_loader(root) == "legacy"
    loader = MegatronLegacyLoader(root)
    assert loader.config().model_copy(update={"vocab_divisor": 32}) == T5
    assert same(loader.tensors(), weights)


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_saver_writes_what_the_specification_gives_and_the_same_bits_come_back(tensor, tmp_path):
    weights = random_weights(T5)
    write_model(tmp_path / "native", T5.model_dump(mode="json"), weights.items())
    convert("native", tmp_path / "native", "legacy", tmp_path / "old", model_type="T5", options=sizes(tensor))
    convert("legacy", tmp_path / "old", "native", tmp_path / "back", model_type="T5", verify=True)
    assert read_tensors(tmp_path / "back") == read_tensors(tmp_path / "native")
    assert open_checkpoint(tmp_path / "back").config() == T5
    expected = write_t5(tmp_path / "expected", weights, tensor=tensor)
    for path in sorted((expected / "release").glob("*/*")):
        written = contents(tmp_path / "old" / path.relative_to(expected))
        assert same(flat(written["model"]), dict(flat(contents(path)["model"])))


@pytest.mark.parametrize("changes", [{"final_norm": False}, {"tied": False, "head_bias": False}], ids=str)
def test_what_the_old_classes_cannot_be_is_refused(changes, tmp_path):
    config = T5Config.model_validate(T5.model_dump() | changes)
    with pytest.raises(MtError, match="a T5 with final_norm = .*; the old classes have both"):
        save(tmp_path / "old", config, ())
