"""Between Megatron's `args`, which describe a model in its checkpoints, and `GPTConfig`. Both ways go through tables.

Reading refuses what the arguments ask for and GPT lacks; writing refuses what Megatron has no argument for.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from mt_ckpt.megatron.layout import Layout
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "padded_vocab_size")
"""Arguments without which there is no telling what the model is."""
PLAIN: Mapping[str, Any] = {
    "num_experts": None,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "use_rope_scaling": False,
    "window_size": None,
    "mtp_num_layers": None,
    "quick_geglu": False,
    "attention_output_gate": False,
    "hybrid_override_pattern": None,
    "hybrid_layer_pattern": None,
    "heterogeneous_layers_config_path": None,
    "expert_model_parallel_size": 1,
}
"""Arguments that change what is computed, and the only value that we implement; absent or None is that value too."""
POSITIONS = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
NORMS = {"RMSNorm": "rms", "LayerNorm": "layer"}


def read_args(args: Any, where: str, true_vocab_size: int | None = None) -> GPTConfig:
    """The configuration that `args` describe; one `MtError` names everything that is missing or not implemented."""
    raise_if(Problem(where, *problem) for problem in _problems(vars(args)))
    get = {**vars(args)}.get
    heads, hidden = args.num_attention_heads, args.hidden_size
    gated, biased = bool(get("swiglu")), bool(get("add_bias_linear", not get("disable_bias_linear", False)))
    vocab = true_vocab_size or get("vocab_size") or args.padded_vocab_size
    if vocab > args.padded_vocab_size:
        allowed = f"at most padded_vocab_size = {args.padded_vocab_size}"
        raise MtError(where, f"a true vocabulary of {vocab} does not fit the embedding", allowed)
    position = POSITIONS[get("position_embedding_type") or "learned_absolute"]
    values = {
        "layers": args.num_layers,
        "model_size": hidden,
        "vocab_size": vocab,
        "max_positions": args.max_position_embeddings,
        "attention": {
            "heads": heads,
            "kv_groups": get("num_query_groups") if get("group_query_attention") else heads,
            "head_size": get("kv_channels") or hidden // heads,
            "qkv_bias": biased or bool(get("add_qkv_bias")),
            "out_bias": biased,
        },
        "mlp": {
            "kind": "gated" if gated else "dense",
            "size": get("ffn_hidden_size") or 4 * hidden,
            "activation": "silu" if gated else _activation(get),
            "bias": biased,
        },
        "norm": {
            "kind": NORMS[get("normalization") or "LayerNorm"],
            "eps": get("norm_epsilon") or get("layernorm_epsilon") or 1e-5,
        },
        "position": {"kind": position} | ({"theta": get("rotary_base") or 10_000} if position == "rope" else {}),
        "tied": not get("untie_embeddings_and_output_weights", False),
        "init_std": get("init_method_std") or 0.02,
        "vocab_divisor": get("make_vocab_size_divisible_by") or 128,
    }
    try:
        return GPTConfig.model_validate(values)
    except ValidationError as err:
        raise MtError.of(
            Problem(where, f"args: {e['msg']}", "the checkpoint cannot be read") for e in err.errors()
        ) from None


def _activation(get: Any) -> str:
    """Megatron's fused bias-GeLU is the tanh approximation; without fusion its GeLU is exact."""
    if get("squared_relu"):
        return "squared_relu"
    return "gelu_tanh" if get("openai_gelu") or get("bias_gelu_fusion") else "gelu"


def _problems(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in SIZES:
        if type(args.get(name)) is not int or args[name] < 1:
            yield f"args.{name} is {args.get(name)!r}", "it must be a positive integer"
    for name, only in PLAIN.items():
        if args.get(name) is not None and args[name] != only:
            yield f"args.{name} is {args[name]!r}", f"only {only!r} is implemented"
    for name, known in (("position_embedding_type", POSITIONS), ("normalization", NORMS)):
        if args.get(name) is not None and args[name] not in known:
            yield f"args.{name} is {args[name]!r}", f"implemented: {', '.join(known)}"


def write_args(config: GPTConfig, layout: Layout, *, dtype: Any, form: str) -> Namespace:
    """The arguments of a model: what --use-checkpoint-args reads, and what Megatron compares before it loads (§1.2)."""
    part, mlp, position = config.attention, config.mlp, config.position
    assert mlp.kind != "moe", "check_carried refuses it"
    all_biased = part.qkv_bias and part.out_bias and mlp.bias
    each = config.layers // (layout.pipeline * layout.virtual)
    theta = position.theta if position.kind == "rope" else 10_000.0
    return Namespace(
        num_layers=config.layers,
        hidden_size=config.model_size,
        ffn_hidden_size=mlp.size,
        seq_length=config.max_positions,
        max_position_embeddings=config.max_positions,
        num_attention_heads=part.heads,
        num_query_groups=part.kv_groups,
        group_query_attention=part.kv_groups != part.heads,
        kv_channels=part.head_size,
        position_embedding_type={ours: theirs for theirs, ours in POSITIONS.items()}[position.kind],
        add_position_embedding=position.kind == "learned",
        use_rotary_position_embeddings=position.kind == "rope",
        rotary_base=int(theta) if theta == int(theta) else theta,
        rotary_percent=1.0,
        rotary_interleaved=False,
        add_bias_linear=all_biased,
        add_qkv_bias=part.qkv_bias and not all_biased,
        swiglu=mlp.kind == "gated",
        squared_relu=mlp.activation == "squared_relu",
        openai_gelu=mlp.activation == "gelu_tanh" and not mlp.bias,
        bias_gelu_fusion=mlp.activation == "gelu_tanh" and mlp.bias,
        normalization={ours: theirs for theirs, ours in NORMS.items()}[config.norm.kind],
        norm_epsilon=config.norm.eps,
        layernorm_epsilon=config.norm.eps,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=config.init_std,
        untie_embeddings_and_output_weights=not config.tied,
        make_vocab_size_divisible_by=config.vocab_divisor,
        padded_vocab_size=config.vocab_rows(layout.tensor),
        vocab_size=config.vocab_size,
        tokenizer_type=None,
        tokenizer_model=None,
        num_experts=None,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        num_layers_per_virtual_pipeline_stage=each if layout.virtual > 1 else None,
        expert_model_parallel_size=1,
        params_dtype=dtype,
        ckpt_format=form,
        data_parallel_random_init=False,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )


def check_carried(config: GPTConfig) -> None:
    """Refuse a model that Megatron has no arguments for, naming every obstacle."""
    if config.kind != "gpt":
        raise MtError("saver core", f"cannot carry a {config.kind!r} model", "or use --saver native")
    if config.mlp.kind == "moe":
        raise MtError("saver core", "cannot carry mlp.kind = 'moe'", "or use --saver native")
    raise_if(Problem("saver core", f"cannot carry {lost}", "or use --saver native") for lost in _lost(config))


def _lost(config: GPTConfig) -> Iterator[str]:
    """What would change if the arguments were read back."""
    args = write_args(config, Layout(1, 1, 1, engine=False), dtype=None, form="torch")
    kept = _flat(read_args(args, "saver core").model_dump())
    for path, value in _flat(config.model_dump()).items():
        if path != "attention.core" and kept.get(path) != value:
            yield f"{path} = {value!r}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
