"""Mixtures of experts: Mixtral and Qwen3-MoE. Both store each expert's projections apart.

Transformers 5 holds a layer's experts in one tensor and, asked not to keep the original format, writes that under the
same names for both: `mlp.experts.gate_up_proj` and `mlp.experts.down_proj`, which are read too.
"""

from mt_ckpt.huggingface.families.decoder import (
    ALWAYS,
    ATTENTION,
    ATTENTION_BIASES,
    HEAD_NORMS,
    KEYS,
    NO_ATTENTION_BIASES,
    NORMS,
    decoder_names,
)
from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.ignored_keys import ANY, IGNORED
from mt_ckpt.huggingface.families.windows import Window

OURS = ("gate", "up", "down")
IN_TRANSFORMERS = {
    "mlp.gate": "mlp.router",
    **{f"mlp.experts.{{e}}.{name}_proj": f"mlp.experts.{{e}}.{name}" for name in OURS},
}
OF_MIXTRAL = {
    "block_sparse_moe.gate": "mlp.router",
    **{
        f"block_sparse_moe.experts.{{e}}.{theirs}": f"mlp.experts.{{e}}.{name}"
        for theirs, name in zip(("w1", "w3", "w2"), OURS, strict=True)
    },
}
EXPERTS = {key: value for key, value in ALWAYS.items() if key != "mlp.bias"} | {"mlp.kind": "moe"}

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | ATTENTION | OF_MIXTRAL, also=IN_TRANSFORMERS),
    keys=KEYS
    | {
        "mlp.experts": Key("num_local_experts"),
        "mlp.top_k": Key("num_experts_per_tok"),
        "norm.eps": Key("rms_norm_eps", 1e-5),
        "position.theta": Key("rope_theta", 1_000_000.0),
    },
    always=EXPERTS | NO_ATTENTION_BIASES | {"mlp.normalized": True},
    window=Window(),
    token_ids={"bos_token_id": 1, "eos_token_id": 2},
)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    prefix="model.",
    names=decoder_names(NORMS | HEAD_NORMS | ATTENTION | IN_TRANSFORMERS),
    keys=KEYS
    | ATTENTION_BIASES
    | {
        "mlp.ffn_hidden_size": Key("moe_intermediate_size"),
        "mlp.experts": Key("num_experts", also=("num_local_experts",)),
        "mlp.top_k": Key("num_experts_per_tok"),
        "mlp.normalized": Key("norm_topk_prob", False),
    },
    always=EXPERTS | {"attention.qk_norm": True},
    also_written=lambda config: [
        ("intermediate_size", config.mlp.ffn_hidden_size)
    ],  # of layers without experts: there are none
    ignored=IGNORED | {"intermediate_size": ANY},
    required={"decoder_sparse_step": 1, "mlp_only_layers": []},
    window=Window(default=4096, switched=True),
)
