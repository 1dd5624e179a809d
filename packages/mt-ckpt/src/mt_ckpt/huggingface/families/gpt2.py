"""GPT-2. Its linear layers are stored [in, out], with query, key and value side by side in one tensor."""

from mt_ckpt.huggingface.families.family import Family, Key
from mt_ckpt.huggingface.families.ignored_keys import ANY, IGNORED
from mt_ckpt.tensor_streams.names import Names

_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn.q": "attn.q",
    "attn.c_attn.k": "attn.k",
    "attn.c_attn.v": "attn.v",
    "attn.c_proj": "attn.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}

NAMES = Names(
    {
        "transformer.wte.weight": "embed.weight",
        "transformer.wpe.weight": "position.weight",
        **{
            f"transformer.h.{{n}}.{theirs}.{part}": f"layers.{{n}}.{ours}.{part}"
            for theirs, ours in _BLOCK.items()
            for part in ("weight", "bias")
        },
        "transformer.ln_f.weight": "norm.weight",
        "transformer.ln_f.bias": "norm.bias",
        "lm_head.weight": "head.weight",
    },
    ignore=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),  # the causal mask, a buffer in old exports
)

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    names=NAMES,
    keys={
        "layers": Key("n_layer"),
        "hidden_size": Key("n_embd"),
        "vocab_size": Key("vocab_size"),
        "max_seq_len": Key("n_positions"),
        "attention.heads": Key("n_head"),
        "mlp.ffn_hidden_size": Key("n_inner", lambda raw: 4 * raw["n_embd"]),
        "mlp.activation": Key(
            "activation_function",
            "gelu_new",
            {"gelu_tanh": "gelu_new", "squared_relu": "relu2"},
            {"gelu_pytorch_tanh": "gelu_tanh"},
        ),
        "norm.eps": Key("layer_norm_epsilon", 1e-5),
        "tied": Key("tie_word_embeddings", True),
        "init_std": Key("initializer_range", 0.02),
        "dropout.attention": Key("attn_pdrop", 0.1),
        "dropout.hidden": Key("resid_pdrop", 0.1),
        "dropout.embedding": Key("embd_pdrop", 0.1),
    },
    always={
        "attention.kind": "gqa",
        "attention.num_kv_heads": lambda raw: raw["n_head"],
        "attention.head_size": lambda raw: raw["n_embd"] // raw["n_head"],
        "attention.qkv_bias": True,
        "attention.out_bias": True,
        "mlp.kind": "dense",
        "mlp.bias": True,
        "norm.kind": "layer",
        "position.kind": "learned",
    },
    ignored=IGNORED | {"n_ctx": ANY, "reorder_and_upcast_attn": ANY, "predict_special_tokens": ANY},
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    fused={"attn.c_attn": ("attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v")},
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    token_ids={"bos_token_id": 50256, "eos_token_id": 50256},
)
