"""Latent attention, dense layers before experts and the router's bias, in Megatron's layouts and in its args."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from ckpt.megatron.test_errors import edit, found
from ckpt.megatron.test_round_trip import build_config, sizes
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.args.gpt import read_args, write_args
from mt_ckpt.megatron.dist_format.metadata import read_metadata
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.legacy.saver import save as save_legacy
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

FILE = "model_optim_rng.pt"
PART = {"kind": "mla", "heads": 4, "kv_lora_rank": 8, "nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5}
LOW = {"attention": PART | {"q_lora_rank": 10}}
ROUTER = {"experts": 4, "top_k": 2, "score": "sigmoid", "expert_bias": True, "expert_bias_update_rate": 0.01}
MLP = {"mlp": {"kind": "moe", "ffn_hidden_size": 20, "dense_layers": 1, "dense_ffn_hidden_size": 24} | ROUTER}
YARN = {"kind": "yarn", "factor": 4.0, "original_positions": 8, "mscale": 0.7, "mscale_all_dim": 0.7}
YARN_OF_HUGGING_FACE = {name: value for name, value in YARN.items() if name not in ("kind", "original_positions")}
YARN_OF_HUGGING_FACE |= {"rope_type": "yarn", "original_max_position_embeddings": 8}
SCALED = {"position": {"kind": "rope", "theta": 500.0, "scaling": YARN}}
MODELS: dict[str, dict[str, Any]] = {
    "low-rank queries, YaRN": LOW | SCALED | {"layers": 2},
    "experts after a dense layer": {"attention": PART} | MLP,
    "grouped queries, experts after a dense layer": MLP,
}
LOCAL, DIST = {"saver_transformer_impl": "local"}, {"target_ckpt_format": "torch_dist"}


def write(directory, model="experts after a dense layer", **options):
    """A checkpoint of random weights for Megatron, its configuration and its tensors."""
    config, random = build_config(**MODELS[model]), torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random) for name, shape in config.canonical_shapes().items()}
    save(directory, config, tensors.items(), **options)
    return config, tensors


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("low-rank queries, YaRN", sizes(2, 2)),
        ("low-rank queries, YaRN", sizes(2) | LOCAL),
        ("low-rank queries, YaRN", sizes(2) | DIST),
        ("experts after a dense layer", sizes(2, 2) | LOCAL | {"target_expert_parallel_size": 2}),
        ("experts after a dense layer", sizes(2, 2, 2) | {"target_expert_parallel_size": 4, "moe_grouped_gemm": True}),
        ("experts after a dense layer", sizes(1, 2) | DIST | {"target_expert_parallel_size": 2}),
        ("experts after a dense layer", sizes(2) | DIST | LOCAL),
        ("grouped queries, experts after a dense layer", sizes(1, 4)),
        ("grouped queries, experts after a dense layer", sizes(2) | DIST | LOCAL),
        ("grouped queries, experts after a dense layer", DIST),
    ],
    ids=str,
)
def test_every_layout_gives_the_same_bits_back(model, options, tmp_path):
    config, tensors = write(tmp_path / "core", model, **options)
    loader = MegatronCoreLoader(tmp_path / "core")
    assert loader.config() == config
    assert same(dict(loader.tensors()), tensors)


@pytest.mark.parametrize(("family", "changes"), [("deepseek_v2", {}), ("deepseek_v3", {"num_experts_per_tok": 4})])
def test_deepseek_s_models_go_from_hugging_face_to_megatron(family, changes, save_model, tmp_path):
    path = save_model(family, rope_scaling=YARN_OF_HUGGING_FACE, **changes)
    convert("hf", path, "core", tmp_path / "core", options=sizes(2, 2))
    source, result = open_checkpoint(path), open_checkpoint(tmp_path / "core")
    assert result.config() == source.config()
    assert same(dict(result.tensors()), dict(source.tensors()))


def list_names(state, layer):
    prefix = f"decoder.layers.{layer}."
    return {name.removeprefix(prefix) for name in state["model"] if name.startswith(prefix) and "_extra" not in name}


def test_the_engine_fuses_norms_but_before_latent_projections_and_experts(tmp_path):
    """docs/specs/checkpoints.md §3.6, §3.7."""
    write(tmp_path / "core", moe_grouped_gemm=True)
    state = safe_unpickle.read(tmp_path / "core" / "release" / "mp_rank_00" / FILE)
    attention = {
        "input_layernorm.weight",
        *(f"self_attention.linear_{name}.weight" for name in ("q_proj", "kv_down_proj", "kv_up_proj", "proj")),
        "self_attention.linear_kv_up_proj.layer_norm_weight",
    }
    dense = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    experts = {f"mlp.experts.linear_fc{which}.weight{number}" for which in (1, 2) for number in range(4)}
    router = {"pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.expert_bias"}
    assert list_names(state, 0) == attention | dense
    assert list_names(state, 1) == attention | experts | router
    states = {name for name in state["model"] if name.startswith("decoder.layers.0.") and "_extra" in name}
    assert {name.removeprefix("decoder.layers.0.").removesuffix("._extra_state") for name in states} == {
        "input_layernorm",
        "self_attention.core_attention",
        *(f"self_attention.linear_{name}" for name in ("q_proj", "kv_down_proj", "kv_up_proj", "proj")),
        *("mlp.linear_fc1", "mlp.linear_fc2"),
    }


def test_the_engine_s_low_rank_queries_have_their_norm_in_the_projection_after_it(tmp_path):
    write(tmp_path / "core", "low-rank queries, YaRN")
    state = safe_unpickle.read(tmp_path / "core" / "release" / "mp_rank_00" / FILE)
    projections = ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
    assert {name for name in list_names(state, 1) if name.startswith(("self_attention", "input"))} == {
        "input_layernorm.weight",
        *(f"self_attention.linear_{name}.weight" for name in projections),
        *(f"self_attention.linear_{name}.layer_norm_weight" for name in ("q_up_proj", "kv_up_proj")),
    }


def test_rotated_features_stand_in_pairs_at_the_end_of_each_head(tmp_path):
    """Feature 2i of a head turns with 2i + 1 there, i with i + 2 here (docs/specs/checkpoints.md §3.7)."""
    _, tensors = write(tmp_path / "core")
    state = safe_unpickle.read(tmp_path / "core" / "release" / "mp_rank_00" / FILE)
    pairs = [0, 2, 1, 3]
    theirs, ours = state["model"]["decoder.layers.1.self_attention.linear_q_proj.weight"], "layers.1.attn.q.weight"
    for head in range(4):
        assert torch.equal(theirs[head * 10 : head * 10 + 6], tensors[ours][head * 10 : head * 10 + 6])
        assert torch.equal(theirs[head * 10 + 6 : head * 10 + 10], tensors[ours][head * 10 + 6 :][pairs])
    down = state["model"]["decoder.layers.1.self_attention.linear_kv_down_proj.weight"]
    assert torch.equal(down, tensors["layers.1.attn.kv_down.weight"][[*range(8), *(8 + n for n in pairs)]])


def test_compressing_projections_are_read_whole_or_cut_whosever_layers_they_are_of(tmp_path):
    """0.11's layers of Transformer Engine's cut them, later ones do not (docs/specs/checkpoints.md §3.7)."""
    _, tensors = write(tmp_path / "core", "low-rank queries, YaRN", **sizes(2))
    directory = tmp_path / "core" / "release"
    for rank in range(2):

        def cut(state, rank=rank):
            for layer in range(2):
                for name, rows in (("q_down", 10), ("kv_down", 12)):
                    key = f"decoder.layers.{layer}.self_attention.linear_{name}_proj.weight"
                    assert len(state["model"][key]) == rows
                    state["model"][key] = state["model"][key].chunk(2)[rank].clone()

        edit(directory / f"mp_rank_{rank:02d}" / FILE, cut)
    assert same(dict(MegatronCoreLoader(directory).tensors()), tensors)


def test_layers_that_are_not_alike_have_keys_of_their_own(tmp_path):
    write(tmp_path / "core", **DIST)
    stored = read_metadata(tmp_path / "core" / "release")
    fc1 = "decoder.layers.{}.mlp.{}linear_fc1.weight"
    assert stored[fc1.format(0, "")].size == (48, 16)
    assert stored[fc1.format(1, "experts.experts.")].size == (4, 40, 16)
    assert stored["decoder.layers.1.mlp.router.expert_bias"].size == (4,)
    states = [key for key in stored if key.startswith("decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state")]
    assert [key.rpartition("/")[2] for key in states] == [f"shard_{expert}_4" for expert in range(4)]


ARGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sizes": (
        LOW,
        {"multi_latent_attention": True, "q_lora_rank": 10, "kv_lora_rank": 8, "qk_head_dim": 6}
        | {"qk_pos_emb_head_dim": 4, "v_head_dim": 5, "qk_layernorm": True, "rope_type": "rope"},
    ),
    "DeepSeek's YaRN": (
        LOW | SCALED,
        {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8, "rotary_base": 500}
        | {"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "plain YaRN": (
        LOW | {"position": {"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 8}}},
        {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 0.0},
    ),
    "dense layers and a bias": (
        MLP,
        {"moe_layer_freq": [0, 1, 1, 1], "ffn_hidden_size": 24, "moe_ffn_hidden_size": 20}
        | {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01},
    ),
}


@pytest.mark.parametrize("case", ARGS)
def test_settings_become_args_and_come_back(case):
    changes, expected = ARGS[case]
    config = build_config(**changes)
    args = write_args(config, Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    assert {name: vars(args)[name] for name in expected} == expected
    assert read_args(args, "here") == config


@pytest.mark.parametrize(
    ("changed", "scaling"),
    [
        ({"rope_type": None}, YARN),
        ({"rope_type": "rope", "mscale_all_dim": 0.0}, None),
        ({"rotary_scaling_factor": 1.0}, None),
        ({"original_max_position_embeddings": None, "beta_fast": None}, YARN | {"original_positions": 4096}),
        ({"mscale_all_dim": 0.0}, YARN | {"mscale_all_dim": 0.0, "attention_factor": 1.0970406052783923}),
    ],
    ids=str,
)
def test_args_of_positions_are_read_as_megatron_computes_them(changed, scaling):
    args = write_args(build_config(**LOW, **SCALED), Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    config = read_args(Namespace(**{**vars(args), **changed}), "here")
    assert config == build_config(**LOW, position={"kind": "rope", "theta": 500.0, "scaling": scaling})
    again = write_args(config, Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    assert read_args(again, "here") == config


REFUSED: dict[str, Any] = {
    "args.kv_lora_rank is None": "it must be a positive integer with latent attention",
    "args.q_lora_rank is 0": "it must be a positive integer with latent attention",
    "args.qk_layernorm is False": "with latent attention only True is implemented",
    "args.window_size is (7, 0)": "with latent attention only None is implemented",
    "args.use_rope_scaling is True": "with latent attention only False is implemented",
    "args.rotary_seq_len_interpolation_factor is 2": "with latent attention only None is implemented",
    "args.add_bias_linear is True": "with latent attention only False is implemented",
    "args.position_embedding_type is 'none'": "latent attention always rotates: only 'rope' is implemented",
    "args.rope_type is 'other'": "implemented: rope, yarn",
    "args.rotary_scaling_factor is None": "YaRN's must be a number from 1 on",
    "args.mscale is None": "YaRN's must be a number",
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_megatron_s_latent_attention_has_and_ours_not_is_refused(problem):
    args = write_args(build_config(**LOW, **SCALED), Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    name, _, value = problem.removeprefix("args.").partition(" is ")
    with pytest.raises(MtError) as raised:
        read_args(Namespace(**{**vars(args), name: eval(value)}), "here")
    assert str(raised.value) == f"here: {problem}; {REFUSED[problem]}"


def test_a_factor_that_sharpens_scores_without_yarn_is_refused():
    args = write_args(build_config(**LOW, **SCALED), Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    args.rope_type = "rope"
    with pytest.raises(MtError, match=r"args.mscale_all_dim is 0.7; Megatron sharpens scores by it: with rope, only 0"):
        read_args(args, "here")


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        (
            {"attention": PART | {"norm_eps": 1e-3, "scale": 0.5}},
            ["attention.norm_eps = 0.001", "attention.scale = 0.5"],
        ),
        (
            LOW | {"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 2.0}}},
            ["position.scaling.kind = 'linear'"],
        ),
        (
            LOW | {"position": {"kind": "rope", "scaling": YARN | {"attention_factor": 1.5}}},
            ["position.scaling.attention_factor = 1.5"],
        ),
        (LOW | {"position": {"kind": "learned"}}, ["position.kind = 'learned' with attention.kind = 'mla'"]),
    ],
    ids=["norms and scale", "linear", "factor", "learned"],
)
def test_what_ours_has_and_megatron_s_latent_attention_not_is_refused(changes, lost, tmp_path):
    with pytest.raises(MtError) as raised:
        save(tmp_path / "core", build_config(**changes), ())
    assert found(raised) == [f"cannot carry {setting}" for setting in lost]


def test_norms_of_another_epsilon_are_refused_with_the_reason(tmp_path):
    with pytest.raises(MtError, match=r"norm_eps = 0.5; all norms of Megatron's have the same; or use --saver native"):
        save(tmp_path / "core", build_config(attention=PART | {"norm_eps": 0.5}), ())


def test_only_megatron_s_own_layers_need_compressed_features_that_divide(tmp_path):
    config = build_config(**LOW | {"attention": LOW["attention"] | {"q_lora_rank": 9}})
    with pytest.raises(MtError, match="attention.q_lora_rank = 9 does not divide by 2 tensor ranks"):
        save(tmp_path / "core", config, (), **sizes(2), **LOCAL)
    wide = build_config(mlp=MLP["mlp"] | {"dense_ffn_hidden_size": 21})
    with pytest.raises(MtError, match="mlp.dense_ffn_hidden_size = 21 does not divide by 2 tensor ranks"):
        save(tmp_path / "core", wide, (), **sizes(2))


def test_the_old_classes_have_no_latent_attention(tmp_path):
    with pytest.raises(MtError, match="the old classes have no multi_latent_attention = True; use --saver core"):
        save_legacy(tmp_path / "old", build_config(**LOW), ())
