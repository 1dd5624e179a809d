"""Settings that Megatron's args can say are carried, others are refused; odd iterations, stages, args and copies."""

import json
from argparse import Namespace

import pytest
import torch

from ckpt.megatron.test_errors import FILE, core, edit, found  # noqa: F401 (core is a fixture)
from ckpt.megatron.test_round_trip import build_config, convert_there_and_back, native, read_tensors, sizes  # noqa: F401 (a fixture)
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.args.gpt import read_args, write_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.parameters.pipeline import layer_locations, stage_layers
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

HEADS = {"heads": 4, "num_kv_heads": 2, "head_size": 6}
LLAMA3 = {"kind": "llama3", "factor": 32.0, "original_positions": 8192}
CARRIED = {
    "query and key norms": ({"attention": HEADS | {"qk_norm": True}}, {"qk_layernorm": True}),
    "a window": ({"attention": HEADS | {"window": 8}}, {"window_size": (7, 0), "window_attn_skip_freq": None}),
    "a window in some layers": (
        {"attention": HEADS | {"window": 8, "window_layers": [True, False]}},
        {"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1, 0]},
    ),
    "Llama 3's positions": (
        {"position": {"kind": "rope", "theta": 5e5, "scaling": LLAMA3}},
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500_000},
    ),
    "interpolated positions": (
        {"position": {"kind": "rope", "scaling": {"kind": "linear", "factor": 4.0}}},
        {"rotary_seq_len_interpolation_factor": 4},
    ),
    "norms around zero": ({"norm": {"kind": "rms", "offset": True}}, {"apply_layernorm_1p": True}),
    "dropout": (
        {"dropout": {"attention": 0.2, "hidden": 0.3, "embedding": 0.3}},
        {"attention_dropout": 0.2, "hidden_dropout": 0.3},
    ),
    "no dropout": ({}, {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "experts by all probabilities": (
        {"mlp": {"kind": "moe", "ffn_hidden_size": 8, "experts": 4, "top_k": 1, "normalized": False}},
        {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_ffn_hidden_size": 8},
    ),
}


@pytest.mark.parametrize("case", CARRIED)
def test_settings_become_args_and_come_back(case):
    changes, expected = CARRIED[case]
    config = build_config(**changes)
    args = write_args(config, Layout(1, 1, 1, engine=True), dtype=torch.bfloat16, form="torch")
    assert {name: vars(args)[name] for name in expected} == expected
    assert read_args(args, "here") == config


def test_a_number_says_which_layers_have_no_window():
    """Megatron's own function for it is the witness."""
    utils = pytest.importorskip("megatron.core.transformer.utils")
    args = write_args(build_config(), Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    for frequency in (2, 3, [1, 0, 0, 1]):
        args.window_size, args.window_attn_skip_freq = (3, 0), frequency
        part = read_args(args, "here").attention
        theirs = [utils.is_layer_window_attention((3, 0), frequency, n + 1) for n in range(4)]
        assert [part.get_window(n) for n in range(4)] == [4 if one else None for one in theirs]


def test_what_args_cannot_say_is_told_together(tmp_path):
    config = build_config(
        attention=HEADS | {"scale": 0.5, "softcap": 50.0},
        position={"kind": "rope", "scaling": {"kind": "yarn", "factor": 4.0, "original_positions": 12}},
        post_norms=True,
        scaled_embedding=True,
        logit_softcap=30.0,
    )
    with pytest.raises(MtError) as raised:
        save(tmp_path / "core", config, ())
    assert found(raised) == [
        "cannot carry attention.scale = 0.5",
        "cannot carry attention.softcap = 50.0",
        "cannot carry position.scaling.kind = 'yarn'",
        "cannot carry post_norms = True",
        "cannot carry scaled_embedding = True",
        "cannot carry logit_softcap = 30.0",
    ]


@pytest.mark.parametrize(
    "scaling",
    [LLAMA3 | {"original_positions": 4096}, LLAMA3 | {"high_frequency": 8.0}, {"kind": "linear", "factor": 2.5}],
    ids=["other length", "other band", "no whole factor"],
)
def test_scaling_that_megatron_has_otherwise_is_refused(scaling, tmp_path):
    config = build_config(position={"kind": "rope", "scaling": scaling})
    with pytest.raises(MtError, match=f"cannot carry position.scaling.kind = '{scaling['kind']}'"):
        save(tmp_path / "core", config, ())


def test_args_of_other_settings_are_told_together():
    args = write_args(build_config(), Layout(1, 1, 1, engine=True), dtype=None, form="torch")
    changed = {"window_size": (4, 4), "softmax_type": "learnable", "apply_layernorm_1p": True, "rotary_percent": 0.5}
    with pytest.raises(MtError) as raised:
        read_args(Namespace(**{**vars(args), **changed, "normalization": "LayerNorm"}), "here")
    assert found(raised) == [
        "args.rotary_percent is 0.5",
        "args.softmax_type is 'learnable'",
        "args.apply_layernorm_1p is True",
        "args.window_size is (4, 4)",
    ]


@pytest.mark.parametrize(
    ("layers", "stages", "chunks", "counts"),
    [
        (12, 4, 1, (3, 3, 3, 3)),
        (13, 4, 1, (2, 4, 4, 3)),
        (7, 3, 1, (2, 3, 2)),
        (5, 2, 1, (2, 3)),
        (10, 2, 2, (4, 6)),
        (3, 4, 1, None),
        (9, 2, 2, None),
    ],
)
def test_the_first_and_last_stage_make_up_for_uneven_layers(layers, stages, chunks, counts):
    assert stage_layers(layers, stages, chunks) == counts


def test_virtual_chunks_of_uneven_stages_follow_the_spec():
    """docs/specs/checkpoints.md §3.10 with a = 4, b = 6, v = 2: chunk c of stage p begins at 5 c + 2 p."""
    starts = {(0, 0): 0, (1, 0): 2, (0, 1): 5, (1, 1): 7}
    assert layer_locations(10, 2, 2) == [
        (stage, chunk, n - start)
        for n in range(10)
        for (stage, chunk), start in [max(((at, s) for at, s in starts.items() if s <= n), key=lambda pair: pair[1])]
    ]


@pytest.mark.parametrize("layout", [(1, 3, 1), (2, 2, 3), (1, 4, 2)], ids=str)
def test_uneven_and_virtual_stages_come_back(layout, native, tmp_path):  # noqa: F811
    source = native(layers=8 if layout[1] == 4 else 7 if layout[1] == 3 else 12)
    core, back = convert_there_and_back(source, tmp_path, **sizes(*layout))  # noqa: F811
    assert read_tensors(back) == read_tensors(source)
    args = MegatronCoreLoader(core).source.args
    ends = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    assert ends == ((2, 2) if layout[1] == 3 else (None, None))


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_an_iteration_can_be_named(form, native, tmp_path):  # noqa: F811
    options = {"target_iteration": 70, "target_ckpt_format": form}
    core, back = convert_there_and_back(native(), tmp_path, **options)  # noqa: F811
    assert (core / "latest_checkpointed_iteration.txt").read_text() == "70"
    inside = core / "iter_0000070" / ("common.pt" if form == "torch_dist" else "mp_rank_00/model_optim_rng.pt")
    assert safe_unpickle.read(inside)["iteration"] == 70
    assert read_tensors(back) == read_tensors(core / "iter_0000070")


@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_args_that_files_lack_come_from_the_user(form, core, tmp_path):  # noqa: F811
    directory = core(form=form)
    right, files = read_tensors(directory), list(directory.glob("*/" + FILE)) + list(directory.glob("common.pt"))
    args = vars(safe_unpickle.read(files[0])["args"]) | {"params_dtype": None}
    for file in files:
        edit(file, lambda state: state.pop("args"))
    with pytest.raises(MtError, match=r"has no args, which say what the model is.*; .*--megatron-args"):
        MegatronCoreLoader(directory)
    (tmp_path / "args.json").write_text(json.dumps(args))
    convert("core", directory, "native", tmp_path / "native-2", options={"megatron_args": tmp_path / "args.json"})
    assert read_tensors(tmp_path / "native-2") == right


def test_given_args_go_before_those_of_the_files(core, tmp_path):  # noqa: F811
    (tmp_path / "args.json").write_text(json.dumps({"norm_epsilon": 0.25}))
    assert MegatronCoreLoader(core(), megatron_args=tmp_path / "args.json").config().norm.eps == 0.25


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"),
        ("gpt2", "decoder.layers.1.mlp.linear_fc2.bias"),
    ],
)
def test_copies_that_differ_are_told_with_both_ranks(model, name, core):  # noqa: F811
    directory = core(model)
    edit(directory / "mp_rank_01_000" / FILE, lambda state: state["model"][name].add_(1))
    with pytest.raises(
        MtError, match=r"layers\.\d\..* tensor rank 1 holds another copy than tensor rank 0; copies are"
    ):
        dict(MegatronCoreLoader(directory).tensors())


def test_a_copy_on_another_expert_rank_is_compared(native, tmp_path):  # noqa: F811
    mlp = {"kind": "moe", "ffn_hidden_size": 8, "experts": 4, "top_k": 2}
    options = sizes(2) | {"target_expert_parallel_size": 2}
    convert("native", native(mlp=mlp, layers=1), "core", tmp_path / "core", options=options)
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    edit(tmp_path / "core/release/mp_rank_01_001" / FILE, lambda state: state["model"][name].add_(1))
    message = "tensor rank 1 of expert rank 1 holds another copy than tensor rank 1 of expert rank 0"
    with pytest.raises(MtError, match=message):
        dict(open_checkpoint(tmp_path / "core").tensors())


def test_ranks_of_different_dtypes_are_told(core):  # noqa: F811
    directory, name = core(), "output_layer.weight"
    change = lambda state: state["model"].update({name: state["model"][name].bfloat16()})  # noqa: E731
    edit(directory / "mp_rank_01_001" / FILE, change)
    with pytest.raises(MtError, match="is bfloat16 on tensor rank 1, float32 on others; store it in one dtype"):
        dict(MegatronCoreLoader(directory).tensors())


def test_states_of_kernels_are_passed_over(core):  # noqa: F811
    directory = core()
    more = {"decoder.layers.0.self_attention.core_attention._extra_state": torch.ones(3, dtype=torch.uint8)}
    edit(directory / "mp_rank_00_000" / FILE, lambda state: state["model"].update(more))
    assert len(dict(MegatronCoreLoader(directory).tensors())) == len(build_config().canonical_shapes())
