"""Mixtures of experts in every layout of Megatron's: written and read back to the same bits, odd layouts read."""

import pytest
import torch

from ckpt.megatron.test_errors import edit, found
from ckpt.megatron.test_round_trip import build_config, convert_there_and_back, native, read_tensors, sizes  # noqa: F401 (a fixture)
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.args.gpt import read_args
from mt_ckpt.megatron.args.model_types import model_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

MOE = {"kind": "moe", "ffn_hidden_size": 20, "experts": 4, "top_k": 2, "normalized": True, "aux_loss_coeff": 0.01}
FILE = "model_optim_rng.pt"
FC1, FC2 = (f"decoder.layers.0.mlp.experts.local_experts.{{}}.{name}.weight" for name in ("linear_fc1", "linear_fc2"))


def expert(size, **options):
    return {"target_expert_parallel_size": size, **options}


@pytest.fixture
def core(native, tmp_path):  # noqa: F811
    """`core(tensor=2, expert=2)` → a checkpoint of experts, and its native source."""

    def make(tensor=1, expert=1, **options):
        source = native(layers=2, mlp=MOE)
        options |= {**sizes(tensor), "target_expert_parallel_size": expert}
        convert("native", source, "core", tmp_path / "core", options=options)
        return tmp_path / "core" / "release", source

    return make


@pytest.mark.parametrize(
    "options",
    [
        sizes(2, 2) | expert(2, saver_transformer_impl="local"),
        sizes(1, 2, 2) | expert(4, moe_grouped_gemm=True),
        sizes(2) | expert(1),
        sizes(2, 2) | expert(2, target_ckpt_format="torch_dist"),
        expert(1, target_ckpt_format="torch_dist", saver_transformer_impl="local"),
    ],
    ids=["local 2x2x2", "grouped 1x2x2x4", "engine 2", "torch_dist", "torch_dist local"],
)
def test_experts_come_back_to_the_same_bits(options, native, tmp_path):  # noqa: F811
    source = native(mlp=MOE, attention={"heads": 4, "num_kv_heads": 2, "head_size": 6, "qk_norm": True})
    _, back = convert_there_and_back(source, tmp_path, **options)
    assert read_tensors(back) == read_tensors(source)
    assert open_checkpoint(back).config() == open_checkpoint(source).config()


ROUTED = {
    "score": "sigmoid",
    "scaling_factor": 2.5,
    "groups": 2,
    "top_groups": 1,
    "z_loss_coeff": 0.001,
    "jitter": 0.01,
}


@pytest.mark.parametrize(
    "options",
    [sizes(2, 2) | expert(2), sizes(2) | expert(2, target_ckpt_format="torch_dist")],
    ids=["torch", "torch_dist"],
)
def test_a_shared_expert_and_its_router_come_back_to_the_same_bits(options, native, tmp_path):  # noqa: F811
    source = native(mlp=MOE | ROUTED | {"shared_ffn_hidden_size": 6, "shared_gate": True})
    _, back = convert_there_and_back(source, tmp_path, **options)
    assert read_tensors(back) == read_tensors(source)
    assert open_checkpoint(back).config() == open_checkpoint(source).config()


def test_a_router_that_args_cannot_express_is_refused(native, tmp_path):  # noqa: F811
    settings = {"score": "sigmoid", "normalized": False, "groups": 4, "top_groups": 2, "group_best": 1}
    config = build_config(mlp=MOE | settings | {"experts": 8})
    with pytest.raises(MtError) as error:
        save(tmp_path / "core", config, ())
    assert "cannot carry mlp.normalized = False" in str(error.value)
    for setting, changes in {
        "group_best = 1": {"groups": 2, "top_groups": 1, "group_best": 1},
        r"capacity_factor = 1.5; Megatron drops tokens of a micro-batch, mt those of a sequence; or use": {
            "capacity_factor": 1.5
        },
    }.items():
        with pytest.raises(MtError, match=f"cannot carry mlp.{setting}"):
            save(tmp_path / "core", build_config(mlp=MOE | changes), ())


@pytest.mark.parametrize(
    ("kind", "scope"), [("aux_loss", "micro_batch"), ("seq_aux_loss", "sequence"), ("global_aux_loss", "global_batch")]
)
def test_scopes_of_the_balance_loss_are_kinds_of_megatron_s(kind, scope):
    config = build_config(mlp=MOE | {"aux_loss_scope": scope})
    args = model_args(config, Layout(1, 1, 1, engine=True), dtype=torch.float32, form="torch")
    assert (args.moe_router_load_balancing_type, args.moe_aux_loss_coeff) == (kind, 0.01)
    assert read_args(args, "args") == config
    args.moe_router_load_balancing_type, args.moe_aux_loss_coeff = [kind], [0.01]  # as newer releases write it
    assert read_args(args, "args") == config


def test_several_balance_losses_are_refused():
    args = model_args(build_config(mlp=MOE), Layout(1, 1, 1, engine=True), dtype=torch.float32, form="torch")
    args.moe_router_load_balancing_type = ["seq_aux_loss", "global_aux_loss"]
    expected = (
        r"args.moe_router_load_balancing_type is \['seq_aux_loss', 'global_aux_loss'\]; implemented: seq_aux_loss, "
    )
    with pytest.raises(MtError, match=expected):
        read_args(args, "args")


def test_an_expert_rank_holds_its_experts_and_all_else(core):
    directory, source = core(expert=2, saver_transformer_impl="local")
    assert sorted(path.name for path in directory.iterdir()) == ["mp_rank_00_000", "mp_rank_00_001"]
    first, second = (safe_unpickle.read(directory / f"mp_rank_00_{x:03d}" / FILE)["model"] for x in (0, 1))
    assert first.keys() == second.keys()
    whole = dict(open_checkpoint(source).tensors())
    gate, up = (whole[f"layers.0.mlp.experts.{name}.weight"] for name in ("gate", "up"))
    assert torch.equal(second[FC1.format(1)], torch.cat([gate[3], up[3]]))
    assert torch.equal(first["decoder.layers.0.mlp.router.weight"], second["decoder.layers.0.mlp.router.weight"])


def test_grouped_names_have_the_experts_number_at_their_end(core):
    directory, _ = core(expert=2, moe_grouped_gemm=True)
    state = safe_unpickle.read(directory / "mp_rank_00_001" / FILE)
    assert {name for name in state["model"] if name.startswith("decoder.layers.1.mlp.")} == {
        "decoder.layers.1.mlp.router.weight",
        *(f"decoder.layers.1.mlp.experts.linear_fc1.weight{j}" for j in (0, 1)),
        *(f"decoder.layers.1.mlp.experts.linear_fc2.weight{j}" for j in (0, 1)),
        *(f"decoder.layers.1.mlp.experts.linear_fc{j}._extra_state" for j in (1, 2)),
    }
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in state["model"]
    assert state["args"].moe_grouped_gemm is True


def test_the_experts_of_grouped_gemm_are_read(core):
    """GroupedMLP's weight1 [h, E·2f] and weight2 [E·f, h] are memory of [E, h, 2f] and [E, f, h].

    Source: docs/specs/checkpoints.md §3.6.
    """
    directory, source = core(tensor=2, expert=2, saver_transformer_impl="local")

    def fuse(state):
        model = state["model"]
        for n in range(2):
            layer = f"decoder.layers.{n}.mlp.experts"
            for which in ("1", "2"):
                names = [f"{layer}.local_experts.{e}.linear_fc{which}.weight" for e in (0, 1)]
                memory = torch.stack([model.pop(name).T.contiguous() for name in names])
                h = 16
                model[f"{layer}.weight{which}"] = memory.view(h, -1) if which == "1" else memory.view(-1, h)

    for path in directory.iterdir():
        edit(path / FILE, fuse)
    assert read_tensors(directory) == read_tensors(source)


def test_a_layer_s_own_keys_are_read(core):
    """Main stores layers under keys of their own where not all are alike (docs/specs/checkpoints.md §2.4)."""
    from mt_ckpt.megatron.dist_format.chunks import ChunkLocation, candidate_locations

    directory, _ = core(target_ckpt_format="torch_dist")
    config = MegatronCoreLoader(directory).config()
    assert candidate_locations(config, FC1.format(3))[-1] == ChunkLocation(
        "decoder.layers.0.mlp.experts.experts.linear_fc1.weight", (3,), (4,)
    )


def test_experts_apart_from_tensor_ranks_are_refused(core):
    directory, _ = core(tensor=2, expert=2)
    change = lambda state: setattr(state["args"], "expert_tensor_parallel_size", 1)  # noqa: E731
    edit(directory / "mp_rank_00_000" / FILE, change)
    with pytest.raises(
        MtError, match="args.expert_tensor_parallel_size is 1, tensor_model_parallel_size 2; .*torch_dist"
    ):
        MegatronCoreLoader(directory)


def test_what_args_ask_of_experts_and_mt_lacks_is_told_together(core):
    directory, _ = core()

    def change(state):
        args = state["args"]
        args.moe_latent_size, args.moe_router_score_function = 32, "sqrtsoftplus"
        args.moe_layer_freq, args.moe_router_load_balancing_type = [1, 0], "sinkhorn"
        args.add_bias_linear, args.swiglu, args.moe_expert_capacity_factor = True, False, 1.5

    edit(directory / "mp_rank_00" / FILE, change)
    with pytest.raises(MtError) as raised:
        MegatronCoreLoader(directory).config()
    assert found(raised) == [
        "args.swiglu is False",
        "args.moe_expert_capacity_factor is 1.5",
        "args.moe_latent_size is 32",
        "args.add_bias_linear is True",
        "args.moe_layer_freq is [1, 0]",
        "args.moe_router_score_function is 'sqrtsoftplus'",
        "args.moe_router_load_balancing_type is 'sinkhorn'",
    ]


@pytest.mark.parametrize("frequency", [2, [0, 0], [0, 1, 1], [1, 0], "[0]*1+[1]*1", [0, 2]], ids=str)
def test_experts_in_other_layers_than_all_after_the_first_are_refused(frequency, core):
    directory, _ = core()
    edit(directory / "mp_rank_00" / FILE, lambda state: setattr(state["args"], "moe_layer_freq", frequency))
    allowed = "experts in all layers, or in all after the first: 1, or 0 and then 1 for each of 2 layers"
    with pytest.raises(MtError) as raised:
        MegatronCoreLoader(directory).config()
    assert str(raised.value).endswith(f"args.moe_layer_freq is {frequency!r}; {allowed}")


def test_a_capacity_is_refused_with_what_to_do(core, tmp_path):
    directory, _ = core()
    edit(directory / "mp_rank_00" / FILE, lambda state: setattr(state["args"], "moe_expert_capacity_factor", 1.5))
    with pytest.raises(
        MtError, match="Megatron drops tokens of a micro-batch, .* null in --megatron-args leaves it out"
    ):
        MegatronCoreLoader(directory).config()
    (tmp_path / "args.json").write_text('{"moe_expert_capacity_factor": null}')
    assert MegatronCoreLoader(directory, megatron_args=tmp_path / "args.json").config().mlp.capacity_factor is None


def test_experts_of_another_dtype_are_told(core):
    directory, _ = core(saver_transformer_impl="local")
    change = lambda state: state["model"].update({FC2.format(2): state["model"][FC2.format(2)].half()})  # noqa: E731
    edit(directory / "mp_rank_00" / FILE, change)
    with pytest.raises(MtError, match="is stored as float16, the experts before it as float32; store them all alike"):
        dict(MegatronCoreLoader(directory).tensors())


def test_experts_that_ranks_cannot_share_are_told(core, tmp_path):
    directory, _ = core(expert=2)
    edit(directory / "mp_rank_00_000" / FILE, lambda state: setattr(state["args"], "num_experts", 3))
    with pytest.raises(MtError, match="args ask for 3 experts on 2 expert ranks; as many on each"):
        dict(MegatronCoreLoader(directory).tensors())
    with pytest.raises(MtError, match="mlp.experts = 4 does not divide by 3 expert ranks; a divisor of 4"):
        save(tmp_path / "odd", build_config(mlp=MOE), (), **expert(3))


def test_only_the_engine_has_grouped_names(tmp_path):
    options = {"moe_grouped_gemm": True, "saver_transformer_impl": "local"}
    with pytest.raises(MtError, match="--moe-grouped-gemm: Megatron's own grouped experts are gone"):
        save(tmp_path / "odd", build_config(mlp=MOE), (), **options)


def test_the_command_cuts_experts_and_verifies(native, tmp_path):  # noqa: F811
    options = ["--target-expert-parallel-size", 2, "--moe-grouped-gemm", "--target-iteration", 5, "--verify"]
    save_dir = tmp_path / "core"
    result = mt_ckpt("convert", "--load-dir", native(mlp=MOE), "--saver", "core", "--save-dir", save_dir, *options)
    assert result.exit_code == 0
    assert "verified: source in mt = result in mt" in result.stdout
    assert (save_dir / "iter_0000005" / "mp_rank_00_001" / FILE).is_file()
