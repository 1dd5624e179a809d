"""Memory of a GPU: bytes of each parameter's state, parameters of a rank, activations, against the real thing."""

from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest
import torch

from core.planning.configs import LLAMA8B_8L, h200, run
from mt_core.parallel.layout import build_layout
from mt_core.parallel.tensor.plan import get_cut_dim
from mt_core.planning.layer_costs import RankShape, get_layer_costs
from mt_core.planning.memory import GIB, by_category, memory, total
from mt_core.planning.parameters import count_parameters
from mt_core.planning.precision import state_bytes
from mt_models.config import GPTConfig

STATE = ("weights", "gradients", "master weights", "moments")


def state(ranks: int, *overrides: str) -> float:
    """Bytes of weights and the optimizer for each parameter on a rank."""
    config = run(f"batch.global_batch={ranks}", *overrides)
    sums = by_category(memory(config, build_layout(config, ranks), h200()))
    return sum(sums.get(name, 0) for name in STATE) / count_parameters(config.model, config.parallel.tensor).total


@pytest.mark.parametrize(
    ("dtype", "whole", "kept", "shared"), [("bf16", 18, 6, 12), ("fp16", 20, 4, 16), ("fp32", 16, 8, 8)]
)
def test_bytes_of_a_parameter_are_those_of_the_table(dtype, whole, kept, shared):
    precision = f"precision.dtype={dtype}"
    assert state(4, precision) == whole
    assert state(4, precision, "parallel.sharding=zero1") == kept + shared / 4
    assert state(8, precision, "parallel.sharding=zero1", "parallel.shard_size=2") == kept + shared / 2
    assert state(8, precision, "parallel.sharding=zero1", "parallel.context=2") == kept + shared / 8


def test_gradients_in_bf16_are_widened_by_the_optimizer():
    each = state_bytes(SimpleNamespace(dtype="bf16", gradients="bf16"))
    assert (each.gradient, each.wide_gradient) == (2, 4)


def test_fsdp_shares_all_but_what_is_gathered():
    config = run("batch.global_batch=4", "parallel.sharding=fsdp")
    items = memory(config, build_layout(config, 4), h200())
    count, block = count_parameters(config.model), 218_112_000
    assert count.block == block
    assert count.ends == 2 * 128_256 * 4096 + 4096
    sums = by_category(items)
    assert sums["weights"] == 2 * count.ends + 2 * 2 * block
    assert sums["gradients"] == 4 * count.total / 4 + (2 + 4) * block
    assert sums["master weights"] + sums["moments"] == 12 * count.total / 4


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("biased", [False, True])
def test_parameters_of_a_rank_are_those_that_the_plan_cuts(tensor, biased):
    """Eight ranks repeat each of four groups; 1,000 ids are padded to 1,024."""
    model = GPTConfig(
        layers=2,
        hidden_size=64,
        vocab_size=1000,
        max_seq_len=32,
        attention={"heads": 8, "num_kv_heads": 4, "head_size": 8, "qkv_bias": biased, "out_bias": biased},
        mlp={"kind": "dense" if biased else "gated", "ffn_hidden_size": 96, "bias": biased},
        norm={"kind": "layer" if biased else "rms"},
        position={"kind": "learned" if biased else "rope"},
        tied=biased,
    )
    with torch.device("meta"):
        built = model.build(tensor)
    shares = {}
    for name, parameter in built.named_parameters():
        module, _, leaf = name.rpartition(".")
        (rule,) = (rule for pattern, rule in built.plan(tensor).items() if fnmatchcase(module, pattern))
        cut = get_cut_dim(rule, leaf) is not None
        shares[name] = parameter.numel() // (tensor if cut else 1)
    assert count_parameters(model, tensor).total == sum(shares.values())


MIXTRAL = {"preset": "mixtral-8x7b"}
EXPERTS = 32 * 8 * 3 * 4096 * 14336
"""Parameters of all experts of mixtral-8x7b."""


@pytest.mark.parametrize("expert", [1, 2, 8])
@pytest.mark.parametrize("tensor", [1, 2])
def test_experts_are_divided_over_the_expert_axis_and_by_tensor_ranks_that_share_each(tensor, expert):
    model = run(**MIXTRAL).model
    whole, part = count_parameters(model, tensor), count_parameters(model, tensor, expert)
    assert (whole.experts, part.experts) == (EXPERTS, EXPERTS // expert)
    assert part.total - part.experts == whole.total - whole.experts
    shared = count_parameters(model, tensor, expert, tensor)
    assert shared.experts == EXPERTS // expert // tensor
    assert shared.total - shared.experts == part.total - part.experts
    assert shared.whole == part.whole - (part.experts if tensor > 1 else 0)


def test_each_expert_is_shared_among_the_ranks_that_hold_it():
    config = run("batch.global_batch=16", "parallel.expert=4", "parallel.sharding=zero1", **MIXTRAL)
    sums = by_category(memory(config, build_layout(config, 16), h200()))
    dense = count_parameters(config.model).total - EXPERTS
    assert sums["weights"] == 2 * (dense + EXPERTS / 4)
    assert sums["gradients"] == 4 * (dense + EXPERTS / 4)
    assert sums["moments"] == 8 * (dense + EXPERTS) / 16


def saved_bytes(config: GPTConfig, tokens: int, batch: int) -> int:
    """What autograd keeps of a block's forward pass: storages that are neither parameters nor the angles."""
    from mt_models.layers.router_losses import RoutingRecord

    block = config.build().layers["0"]
    rotation = make_block_rotation(config, tokens)
    not_saved = {p.untyped_storage().data_ptr() for p in block.parameters()} | {
        t.untyped_storage().data_ptr() for t in rotation or ()
    }
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_saved:
            kept[storage.data_ptr()] = storage
        return tensor

    x_BTD = torch.randn(batch, tokens, config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = block(x_BTD, rotation, record=RoutingRecord(), dropout=make_block_dropout(config, batch, tokens))
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def make_block_dropout(config: GPTConfig, batch: int, tokens: int):
    from mt_core.parallel.dropout import DropoutKeys, number_positions
    from mt_core.training.seeds import make_sample_keys

    keys = DropoutKeys(make_sample_keys(0, 0, batch), number_positions(0, tokens, torch.device("cpu")))
    return keys if config.dropout.is_active else None


def make_block_rotation(config: GPTConfig, tokens: int):
    from mt_models.layers.rope import make_rotation

    if config.position.kind != "rope":
        return None
    return make_rotation(torch.arange(tokens), config.attention.rotary_size, theta=1e4, dtype=torch.float32)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("core", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "mlp", [{"kind": "gated"}, *({"kind": "dense", "activation": a} for a in ("gelu_tanh", "relu", "squared_relu"))]
)
def test_activations_are_what_a_real_block_saves(position, groups, core, mlp):
    """To the byte, in fp32. With LayerNorm: on a CPU RMSNorm is made of several functions, on a GPU of one."""
    model = GPTConfig(
        layers=1,
        hidden_size=64,
        vocab_size=128,
        max_seq_len=64,
        attention={"heads": 4, "num_kv_heads": groups, "head_size": 16, "core": core},
        mlp={"ffn_hidden_size": 96, **mlp},
        norm={"kind": "layer"},
        position={"kind": position},
    )
    costs = model.layer_costs(RankShape(tokens=2 * 64, seq_length=64, element_size=4))
    assert sum(tensor.size for tensor in costs.saved) == saved_bytes(model, tokens=64, batch=2)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("rates", [{"hidden": 0.1}, {"attention": 0.1}, {"hidden": 0.1, "attention": 0.1}])
def test_activations_with_dropout_are_what_a_real_block_saves(groups, rates):
    """Masks of a byte for each feature or probability, and attention written out where probabilities are dropped."""
    model = GPTConfig(
        layers=1,
        hidden_size=64,
        vocab_size=128,
        max_seq_len=64,
        attention={"heads": 4, "num_kv_heads": groups, "head_size": 16, "core": "sdpa"},
        mlp={"kind": "dense", "ffn_hidden_size": 96},
        norm={"kind": "layer"},
        position={"kind": "learned"},
        dropout=rates,
    )
    costs = model.layer_costs(RankShape(tokens=2 * 64, seq_length=64, element_size=4))
    assert sum(tensor.size for tensor in costs.saved) == saved_bytes(model, tokens=64, batch=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalized": False},
        {"score": "sigmoid"},
        {"score": "sigmoid", "normalized": False, "scaling_factor": 2.0},
        {"groups": 4, "top_groups": 2, "normalized": False},
        {"score": "sigmoid", "groups": 4, "top_groups": 2},
        {"scaling_factor": 2.0},
        {"aux_loss_coeff": 0.1},
        {"aux_loss_coeff": 0.1, "aux_loss_scope": "micro_batch"},
        {"z_loss_coeff": 0.1},
        {"score": "sigmoid", "aux_loss_coeff": 0.1},
        {"shared_ffn_hidden_size": 32},
        {"shared_ffn_hidden_size": 32, "shared_gate": True},
    ],
    ids=str,
)
def test_activations_of_experts_are_what_a_real_block_saves(changes):
    model = GPTConfig(
        layers=1,
        hidden_size=64,
        vocab_size=128,
        max_seq_len=64,
        attention={"heads": 4, "num_kv_heads": 4, "head_size": 16, "core": "sdpa"},
        mlp={"kind": "moe", "ffn_hidden_size": 48, "experts": 8, "top_k": 3, **changes},
        norm={"kind": "layer"},
        position={"kind": "rope"},
    )
    costs = model.layer_costs(RankShape(tokens=2 * 64, seq_length=64, element_size=4))
    assert sum(tensor.size for tensor in costs.saved) == saved_bytes(model, tokens=64, batch=2)


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("core", ["sdpa", "eager"])
@pytest.mark.parametrize("dropout", [0, 0.1])
def test_activations_of_latent_attention_are_what_a_real_block_saves(position, q_lora_rank, core, dropout):
    """With values as wide as keys where torch's kernel for CPUs is to run."""
    values = 12 if core == "eager" else 24
    sizes = {"kv_lora_rank": 20, "nope_head_size": 16, "rope_head_size": 8, "v_head_size": values}
    model = GPTConfig(
        layers=1,
        hidden_size=64,
        vocab_size=128,
        max_seq_len=64,
        attention={"kind": "mla", "heads": 4, "q_lora_rank": q_lora_rank, "core": core, **sizes},
        mlp={"kind": "dense", "ffn_hidden_size": 96},
        norm={"kind": "layer"},
        position={"kind": position},
        dropout={"attention": dropout},
    )
    costs = model.layer_costs(RankShape(tokens=2 * 64, seq_length=64, element_size=4))
    assert sum(tensor.size for tensor in costs.saved) == saved_bytes(model, tokens=64, batch=2)


def test_a_layer_costs_what_dense_and_expert_layers_cost_on_average():
    experts = {"kind": "moe", "ffn_hidden_size": 48, "experts": 8, "top_k": 3}
    shape = RankShape(tokens=2 * 64, seq_length=64, element_size=4, tensor=2)

    def cost(mlp, field):
        sizes = {"layers": 4, "hidden_size": 64, "vocab_size": 128, "max_seq_len": 64}
        attention = {"heads": 4, "num_kv_heads": 4, "head_size": 16}
        parts = {"attention": attention, "mlp": mlp, "norm": {"kind": "rms"}, "position": {"kind": "rope"}}
        costs = GPTConfig.model_validate(sizes | parts).layer_costs(shape)
        return sum(tensor.size for tensor in costs.saved) if field == "saved" else getattr(costs, field)

    for field in ("saved", "forward_bytes", "tensor_reductions", "repeated_flops", "routed_bytes"):
        dense, mixed = cost({"kind": "gated", "ffn_hidden_size": 96}, field), cost(experts, field)
        average = cost(experts | {"dense_layers": 1, "dense_ffn_hidden_size": 96}, field)
        assert average == pytest.approx(dense / 4 + mixed * 3 / 4, rel=1e-12), field


def test_rows_of_whole_experts_are_cut_by_sequence_parallelism_and_features_of_shared_ones_by_tensor_ranks():
    def rows(*overrides: str) -> float:
        config = run("batch.global_batch=16", *overrides, **MIXTRAL)
        saved = {tensor.name: tensor.size for tensor in get_layer_costs(config, build_layout(config, 8)).saved}
        return saved["rows into and out of experts"] + saved["gate and up"]

    one = 2 * 8192 * 2 * (4096 + 14336) * 2  # two experts a token, in bf16
    assert rows("data.seq_length=8192") == one
    assert rows("data.seq_length=8192", "parallel.expert=8") == one
    whole = ("data.seq_length=8192", "parallel.tensor=4", "parallel.expert_tensor=1")
    assert rows(*whole) == one
    assert rows(*whole, "parallel.sequence=true") == one / 4
    shared = 2 * 8192 * 2 * (4096 + 14336 / 4) * 2
    assert rows("data.seq_length=8192", "parallel.tensor=4") == shared
    assert rows("data.seq_length=8192", "parallel.tensor=4", "parallel.sequence=true") == shared
    padded = ("data.seq_length=8192", "model.mlp.capacity_factor=1.25", "model.mlp.pad_to_capacity=true")
    assert rows(*padded) == one * 1.25
    assert rows(*padded, "model.mlp.capacity_factor=9.0") == one * 4  # every token to each of eight experts
    assert rows(*padded, "parallel.context=2") == one * 1.25  # each of two ranks may have all that an expert takes


def activations(ranks: int, *overrides: str) -> dict[str, float]:
    config = run(f"batch.global_batch={ranks}", *overrides)
    return by_category(memory(config, build_layout(config, ranks), h200()))


def test_tensor_and_sequence_cut_activations():
    whole, both = activations(1), activations(4, "parallel.tensor=4", "parallel.sequence=true")
    assert both["activations"] == whole["activations"] / 4
    apart = activations(4, "parallel.tensor=4")["activations"]
    assert both["activations"] < apart < whole["activations"]


def test_context_cuts_activations_and_logits():
    whole, quarter = activations(1), activations(4, "parallel.context=4")
    assert quarter["logits"] == whole["logits"] / 4
    assert quarter["activations"] < whole["activations"] / 4  # the ring keeps no product of queries, keys, values


def test_full_recompute_keeps_inputs_only():
    kept = activations(1, "recompute.granularity=full")["activations"]
    assert kept == 32 * 8192 * 4096 * 2
    assert activations(1, "recompute.granularity=full", "recompute.layers=4")["activations"] == kept / 4


def test_block_recompute_lies_between():
    none, some, all_ = (
        activations(1, *extra)["activations"]
        for extra in (
            (),
            ("recompute.granularity=full", "recompute.method=block", "recompute.layers=16"),
            ("recompute.granularity=full", "recompute.method=block", "recompute.layers=32"),
        )
    )
    assert some == pytest.approx((none + all_) / 2)
    assert all_ == 32 * 8192 * 4096 * 2


def test_selective_recompute_pays_for_scores_that_are_kept():
    eager, selective = "model.attention.core=eager", "recompute.granularity=selective"
    assert activations(1, eager)["activations"] > 10 * activations(1, eager, selective)["activations"]
    fused = activations(1)["activations"]
    assert 0.98 * fused < activations(1, selective)["activations"] < fused  # only the log-sum-exps


def test_many_layers_at_once_count_while_they_are_recomputed():
    sums = activations(1, "recompute.granularity=full", "recompute.layers=32")
    assert "logits" not in sums
    assert sums["recompute"] > activations(1)["activations"]


GPT2 = ("precision.dtype=bf16", "batch.global_batch=64")
MEASURED = [
    (29.2, "gpt2-124m", (*GPT2, "batch.micro_batch=32")),
    (15.9, "gpt2-124m", (*GPT2, "batch.micro_batch=16")),
    (20.2, "gpt2-124m", ("precision.dtype=fp32", "batch.micro_batch=16", "batch.global_batch=32")),
    (69.7, "llama3-8b", LLAMA8B_8L),
]
"""Peaks of `mt train` on one H200, GiB allocated by torch (docs/benchmarks.md, docs/how-to/plan-a-run.md)."""


@pytest.mark.parametrize(("measured", "preset", "overrides"), MEASURED)
def test_totals_agree_with_measured_peaks(measured, preset, overrides):
    """Within 2%; what torch does not allocate itself is left out."""
    config = run(*overrides, preset=preset)
    items = [item for item in memory(config, build_layout(config, 1), h200()) if item.category != "reserved"]
    assert total(items) / GIB == pytest.approx(measured, rel=0.02)
