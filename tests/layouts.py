"""Small models and the layouts that they run under, for tests that compare a layout with one rank."""

from typing import Any

from mt_cli.run_config import run_config_type
from mt_models.config import GQA, MLA, Dense, Dropout, Gated, LayerNorm, Learned, MoE, NoPosition, RMSNorm, Rope, YaRN

DROPOUT = Dropout(attention=0.2, hidden=0.1, embedding=0.3)

MODELS: dict[str, dict[str, Any]] = {
    "gqa": {"attention": GQA(heads=8, num_kv_heads=4, head_size=4)},
    "mha-tied": {
        "attention": GQA(heads=4, num_kv_heads=4, head_size=8),
        "tied": True,
        "mlp": Dense(ffn_hidden_size=48),
    },
    "learned-biased": {
        "attention": GQA(heads=8, num_kv_heads=4, head_size=4, qkv_bias=True, out_bias=True),
        "mlp": Dense(ffn_hidden_size=48, bias=True),
        "norm": LayerNorm(),
        "position": Learned(),
        "dropout": DROPOUT,
    },
    "repeated-groups": {
        "attention": GQA(heads=8, num_kv_heads=2, head_size=4, qkv_bias=True),
        "mlp": Gated(ffn_hidden_size=48, bias=True),
        "dropout": DROPOUT,
        "position": NoPosition(),
        "tied": True,
    },
    "qk-norm": {
        "attention": GQA(heads=8, num_kv_heads=2, head_size=4, qk_norm=True),
        "norm": RMSNorm(offset=True),
        "post_norms": True,
        "scaled_embedding": True,
        "logit_softcap": 2.0,
    },
    "experts": {
        "attention": GQA(heads=8, num_kv_heads=4, head_size=4),
        "mlp": MoE(ffn_hidden_size=24, experts=4, top_k=2),
        "dropout": DROPOUT,
    },
    "latent": {
        "attention": MLA(
            heads=4, q_lora_rank=12, kv_lora_rank=10, nope_head_size=6, rope_head_size=4, v_head_size=5, norm_eps=1e-3
        ),
        "mlp": MoE(
            **{"ffn_hidden_size": 12, "experts": 4, "top_k": 2, "normalized": False},
            **{"shared_ffn_hidden_size": 24, "dense_layers": 1, "dense_ffn_hidden_size": 48},
        ),
        "position": Rope(scaling=YaRN(factor=4.0, original_positions=8, mscale=0.7, mscale_all_dim=0.9)),
        "dropout": DROPOUT,
    },
}
"""Between them: experts, in all layers or all but the first, latent attention, normalised heads, post-norms, capped
logits, dropout, grouped and full attention, ties, biases, every kind of position, norm and feed-forward layer."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 4": (4, {"tensor": 4}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "tensor 4, sequence": (4, {"tensor": 4, "sequence": True}),
    "context 2, ring": (2, {"context": 2}),
    "context 2, all-gather": (2, {"context": 2, "cp_comm_type": "all_gather"}),
    "context 2, all-to-all": (2, {"context": 2, "cp_comm_type": "all_to_all"}),
    "replicate 2": (2, {"sharding": "replicate"}),
    "zero1 2": (2, {"sharding": "zero1", "bucket_size": 3000}),
    "fsdp 2": (2, {"sharding": "fsdp"}),
    "fsdp 2 × tensor 2": (4, {"sharding": "fsdp", "tensor": 2}),
    "zero1 2 × tensor 2, sequence": (4, {"sharding": "zero1", "tensor": 2, "sequence": True, "bucket_size": 3000}),
    "context 2 × tensor 2": (4, {"context": 2, "tensor": 2}),
    "context 2 × zero1 2": (4, {"context": 2, "sharding": "zero1"}),
    "zero1 2 in replicas 2": (4, {"sharding": "zero1", "shard_size": 2}),
    "fsdp 2 in replicas 2": (4, {"sharding": "fsdp", "shard_size": 2}),
}
"""Ranks and the `parallel` section of the layouts that are tested: every axis, and hybrid sharding."""

BALANCED = {
    "balanced-experts": {
        "attention": GQA(heads=8, num_kv_heads=4, head_size=4),
        "mlp": MoE(
            ffn_hidden_size=20,
            experts=8,
            top_k=3,
            normalized=False,
            aux_loss_coeff=0.5,
            capacity_factor=1.0,
            drop_policy="position",
        ),
        "tied": True,
    },
    "shared-expert": {
        "attention": GQA(heads=8, num_kv_heads=4, head_size=4),
        "mlp": MoE(
            ffn_hidden_size=12,
            experts=8,
            top_k=3,
            score="sigmoid",
            scaling_factor=1.5,
            groups=4,
            top_groups=2,
            expert_bias=True,
            expert_bias_update_rate=0.02,
            jitter=0.2,
            capacity_factor=0.8,
            pad_to_capacity=True,
            aux_loss_coeff=0.3,
            z_loss_coeff=0.1,
            shared_ffn_hidden_size=16,
            shared_gate=True,
        ),
    },
}
"""Experts with losses of the router's, and between them whatever else a router and a mixture may have."""

EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "expert 2": (2, {"expert": 2}),
    "expert 4": (4, {"expert": 4, "bucket_size": 2000}),
    "expert 2 in replicas 2": (4, {"expert": 2, "overlap_grad_reduce": False}),
    "expert 2 × zero1 2": (4, {"expert": 2, "sharding": "zero1", "bucket_size": 3000}),
    "expert 2 × zero1 1 in replicas 2": (4, {"expert": 2, "sharding": "zero1", "shard_size": 2}),
    "expert 2 × fsdp 2": (4, {"expert": 2, "sharding": "fsdp"}),
    "expert 2 × fsdp 1 in replicas 2": (4, {"expert": 2, "sharding": "fsdp", "shard_size": 2}),
    "expert 2 × tensor 2": (4, {"expert": 2, "tensor": 2}),
    "expert 2 × tensor 2, sequence": (4, {"expert": 2, "tensor": 2, "sequence": True, "sharding": "zero1"}),
    "expert 2 × tensor 2 of whole experts": (4, {"expert": 2, "tensor": 2, "expert_tensor": 1}),
    "expert 2 × tensor 2 of whole experts, sequence": (
        4,
        {"expert": 2, "tensor": 2, "expert_tensor": 1, "sequence": True, "sharding": "zero1"},
    ),
    "expert 2 × context 2": (4, {"expert": 2, "context": 2}),
    "expert 2, all-gather": (2, {"expert": 2, "token_dispatcher": "all_gather"}),
    "expert 2 × tensor 2, sequence, all-gather": (
        4,
        {"expert": 2, "tensor": 2, "sequence": True, "token_dispatcher": "all_gather", "sharding": "fsdp"},
    ),
    "expert 2 × tensor 2 in replicas 2": (8, {"expert": 2, "tensor": 2, "bucket_size": 2000}),
}
"""The same for mixtures of experts, data ranks besides expert ranks where there are four: zero1 and fsdp share dense
weights among all ranks, or those of a copy, and each expert among those of them that hold it."""

EIGHT = "E|t|t|t|t||t|tL"
"""Eight stages of six layers, one of them empty."""

PASS_TIMES = [[3, 2, 0.5], [0.5, 3, 1], [1, 1, 0.5], [1, 0.5, 3]]
"""By which passes of four micro-batches through four stages come in another order than if all took equally long."""

PIPELINES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "gpipe 2": (2, {}, {"schedule": "gpipe"}),
    "1f1b 2": (2, {}, {}),
    "interleaved 2 of 2 stages": (2, {}, {"schedule": "interleaved", "layout": "Et|t*2|t*2|tL"}),
    "interleaved 2 of 3 stages": (2, {}, {"schedule": "interleaved", "virtual_stages": 3}),
    "zb-h1 2": (2, {}, {"schedule": "zb-h1"}),
    "zb-2p 2, uneven": (2, {}, {"schedule": "zb-2p", "num_layers_in_first_stage": 1}),
    "zbv 2": (2, {}, {"schedule": "zbv", "layout": "Et|t*3|t|tL"}),
    "dualpipev 2, ends alone": (2, {}, {"schedule": "dualpipev", "layout": "E|t*3|t*3|L"}),
    "gpipe 4": (4, {}, {"schedule": "gpipe", "layout": "Et*2|t*2|t|tL"}),
    "1f1b 4, ends alone": (4, {}, {"layout": "E|t*3|t*3|L"}),
    "interleaved 4": (4, {}, {"schedule": "interleaved", "layout": EIGHT}),
    "interleaved 3, groups of 4": (3, {}, {"schedule": "interleaved", "microbatch_group_size": 4}),
    "zb-h1 4": (4, {}, {"schedule": "zb-h1", "layout": "Et|t|t*2|t*2L"}),
    "zb-2p 4": (4, {}, {"schedule": "zb-2p", "layout": "Et|t|t*2|t*2L", "pass_times": PASS_TIMES}),
    "zbv 4": (4, {}, {"schedule": "zbv", "layout": EIGHT}),
    "dualpipev 4": (4, {}, {"schedule": "dualpipev", "layout": EIGHT}),
    "1f1b 2 × tensor 2, sequence": (4, {"tensor": 2, "sequence": True}, {}),
    "zbv 2 × tensor 2, sequence": (4, {"tensor": 2, "sequence": True}, {"schedule": "zbv", "layout": "Et|t*3|t|tL"}),
    "zb-h1 2 × tensor 2": (4, {"tensor": 2}, {"schedule": "zb-h1"}),
    "interleaved 2 × context 2": (4, {"context": 2}, {"schedule": "interleaved", "virtual_stages": 3}),
    "zb-h1 2 × context 2, all-gather": (4, {"context": 2, "cp_comm_type": "all_gather"}, {"schedule": "zb-h1"}),
    "1f1b 2 × replicate 2": (4, {"sharding": "replicate", "bucket_size": 3000}, {}),
    "interleaved 2 × zero1 2": (
        4,
        {"sharding": "zero1", "bucket_size": 3000},
        {"schedule": "interleaved", "virtual_stages": 3},
    ),
    "dualpipev 2 × zero1 2": (4, {"sharding": "zero1"}, {"schedule": "dualpipev", "layout": "Et|t*3|t|tL"}),
    "1f1b 2 × fsdp 2": (4, {"sharding": "fsdp"}, {}),
    "zbv 2 × fsdp 2": (4, {"sharding": "fsdp"}, {"schedule": "zbv", "layout": "Et|t*3|t|tL"}),
    "1f1b 2 × tensor 2, sequence × zero1 2": (
        8,
        {"tensor": 2, "sequence": True, "sharding": "zero1", "bucket_size": 3000},
        {},
    ),
    "zb-h1 2 × zero1 2 in replicas 2": (8, {"sharding": "zero1", "shard_size": 2}, {"schedule": "zb-h1"}),
    "interleaved 2 × fsdp 2 in replicas 2": (
        8,
        {"sharding": "fsdp", "shard_size": 2},
        {"schedule": "interleaved", "virtual_stages": 3},
    ),
}
"""Ranks and the sections `parallel`, without the pipeline's length, and `pipeline`: every schedule alone, where stages
are uneven, empty, or an end without layers, and with every other axis."""
DEEP = 6
"""Layers of models that are cut into stages."""

EXPERT_PIPELINES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "1f1b 2 × expert 2": (4, {"expert": 2}, {}),
    "zbv 2 × expert 2 × zero1 2": (4, {"expert": 2, "sharding": "zero1"}, {"schedule": "zbv", "layout": "Et|t*3|t|tL"}),
    "interleaved 2 × expert 2 × fsdp 2": (
        4,
        {"expert": 2, "sharding": "fsdp"},
        {"schedule": "interleaved", "virtual_stages": 3},
    ),
    "zb-h1 2 × expert 2 × context 2": (4, {"expert": 2, "context": 2}, {"schedule": "zb-h1"}),
    "1f1b 2 × expert 2 × tensor 2, sequence": (8, {"expert": 2, "tensor": 2, "sequence": True}, {}),
}
"""Experts in stages, with the other axes."""

SAMPLES = 8
"""Of every step."""

STEPS = 20
"""Of long runs, whose gradients are compared in the first three steps, and losses and norms in all."""
LONG = {
    *(layout for layout, (_, parallel, _) in PIPELINES.items() if not parallel),
    "1f1b 2 × tensor 2, sequence",
    "interleaved 2 × context 2",
    "interleaved 2 × zero1 2",
    "1f1b 2 × fsdp 2",
    "1f1b 2 × tensor 2, sequence × zero1 2",
    "1f1b 2 × expert 2",
    "expert 2",
    "expert 4",
    "expert 2 × zero1 2",
    "expert 2 × tensor 2",
    "expert 2 × tensor 2 of whole experts",
    "expert 2 × context 2",
}
"""Layouts of which one model runs long: every schedule alone, and an axis of each kind beside stages and experts."""
STEADY = {"lr": 1e-3, "eps": 1e-4}
"""The `optim` section of long runs. With a tenfold rate roundings grow by each step, in 20 of them to 2e-10 with
experts and to 2e-7 where some drop tokens, between cuts into micro-batches on one rank; with this one to 1e-14."""


def run_config(model: str = "gqa", layers: int = 2, **sections: Any) -> Any:
    """A resolved configuration in fp64 of a small model; sections as plain values."""
    part = {name: v.model_dump() if hasattr(v, "model_dump") else v for name, v in (MODELS | BALANCED)[model].items()}
    values = {
        "model": {
            "kind": "gpt",
            "layers": layers,
            "hidden_size": 32,
            "vocab_size": 61,
            "vocab_divisor": 4,
            "max_seq_len": 16,
            "mlp": Gated(ffn_hidden_size=48).model_dump(),
            "norm": RMSNorm().model_dump(),
            "position": Rope().model_dump(),
            "init_std": 0.2,
            **part,
        },
        "data": {"kind": "mock", "seq_length": 16},
        "batch": {"micro_batch": 1, "global_batch": SAMPLES},
        "precision": {"dtype": "fp64"},
        "optim": {"lr": 1e-2, "eps": 1e-4},
        "runtime": {"device": "cpu"},
    }
    return run_config_type().model_validate(values | sections)


def runtime_config(weight_gradients: str, parallel: dict[str, Any]) -> dict[str, Any]:
    """The `runtime` section of a run on CPUs that adds up gradients of weights so; FSDP2 does so itself."""
    fsdp = parallel.get("sharding") == "fsdp"
    return {"device": "cpu", "weight_gradients": "auto" if fsdp else weight_gradients}


def pipeline_config(model: str, layout: str, **sections: Any) -> Any:
    """The configuration of a deep model in a layout of `PIPELINES` or `EXPERT_PIPELINES`."""
    ranks, parallel, pipeline = (PIPELINES | EXPERT_PIPELINES)[layout]
    length = get_length(layout)
    assert ranks % length == 0
    return run_config(model, DEEP, parallel=parallel | {"pipeline": length}, pipeline=pipeline, **sections)


def get_length(layout: str) -> int:
    """The stages' ranks of a layout of `PIPELINES` or `EXPERT_PIPELINES`: the number behind its schedule."""
    return int(layout.split()[1].rstrip(","))


def data_ranks(ranks: int, parallel: dict[str, Any]) -> int:
    """Ranks of a layout that take different samples."""
    return ranks // (parallel.get("tensor", 1) * parallel.get("context", 1) * parallel.get("pipeline", 1))
