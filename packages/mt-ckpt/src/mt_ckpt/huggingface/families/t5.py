"""T5 v1.1: gated feed-forward layers, an output layer of its own, and scores that nothing divides.

Transformers 5 writes `tie_word_embeddings` true for every T5, unties where a file holds both weights, and says in
`scale_decoder_outputs` what older releases took from `tie_word_embeddings`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.huggingface.families.family import Complaint, Family, Key
from mt_ckpt.huggingface.families.ignored_keys import IGNORED
from mt_ckpt.tensor_streams.names import Names
from mt_models.config import T5Config

LM_HEAD, EMBED = "lm_head.weight", "shared.weight"
EMBED_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Further names of the embedding; safetensors keep one of them, old files hold all."""
PROJECTIONS = {"q": "q", "k": "k", "v": "v", "o": "out"}
FEED_FORWARD = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
STACKS = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
ATTENTIONS = {"SelfAttention": "attn", "EncDecAttention": "cross"}
PROJ = {"gated-gelu": "gelu_tanh", "gated-gelu_new": "gelu_tanh", "gated-silu": "silu"}
"""`feed_forward_proj` to our activation."""
DENSE = {"gelu_tanh": ("gelu_new", "gelu_pytorch_tanh"), "silu": ("silu", "swish")}
"""Our activation to what `dense_act_fn` may call it."""


def _stack(stack: str) -> Iterator[tuple[str, str]]:
    theirs, ours = f"{stack}.block.{{n}}.layer", f"{stack}.layers.{{n}}"
    for number, attention in enumerate(STACKS[stack]):
        part = ATTENTIONS[attention]
        yield f"{theirs}.{number}.layer_norm.weight", f"{ours}.{part}_norm.weight"
        for name, projection in PROJECTIONS.items():
            yield f"{theirs}.{number}.{attention}.{name}.weight", f"{ours}.{part}.{projection}.weight"
    last = f"{theirs}.{len(STACKS[stack])}"
    yield f"{last}.layer_norm.weight", f"{ours}.mlp_norm.weight"
    for name, projection in FEED_FORWARD.items():
        yield f"{last}.DenseReluDense.{name}.weight", f"{ours}.mlp.{projection}.weight"
    first = f"{stack}.block.0.layer.0.SelfAttention"
    yield f"{first}.relative_attention_bias.weight", f"{stack}.relative.weight"
    yield f"{stack}.final_layer_norm.weight", f"{stack}.norm.weight"


NAMES = Names(
    {EMBED: "embed.weight", **dict(_stack("encoder")), **dict(_stack("decoder")), LM_HEAD: "head.weight"},
    also=dict.fromkeys(EMBED_COPIES, "embed.weight"),
    ignore=(
        r"EncDecAttention\.relative_attention_bias\.weight$",  # in the first files, and never used
    ),
)


def _scaled(raw: Mapping[str, Any]) -> bool:
    scaled = raw.get("scale_decoder_outputs")
    return bool(raw.get("tie_word_embeddings", True) if scaled is None else scaled)


def _tied(raw: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Tied where the file holds one weight for both, under whichever name, and config.json does not forbid it."""
    both = LM_HEAD in names and not names.isdisjoint((EMBED, *EMBED_COPIES))
    return _scaled(raw) or (not both and bool(raw.get("tie_word_embeddings", True)))


def _activation(raw: Mapping[str, Any]) -> str:
    return PROJ.get(str(raw.get("feed_forward_proj")), "gelu_tanh")


def _odd_activations(raw: Mapping[str, Any]) -> Iterator[Complaint]:
    projection, function = raw.get("feed_forward_proj", "relu"), raw.get("dense_act_fn")
    if str(projection) not in PROJ:
        yield f"feed_forward_proj is {projection!r}", f"of T5, only v1.1 is implemented: {', '.join(PROJ)}"
    elif function not in (None, *DENSE[_activation(raw)]):
        yield f"dense_act_fn is {function!r}, against feed_forward_proj {projection!r}", "make them agree"


def _written(config: T5Config) -> Iterator[tuple[str, Any]]:
    yield "feed_forward_proj", {ours: theirs for theirs, ours in reversed(PROJ.items())}.get(config.mlp.activation)
    yield "tie_word_embeddings", config.tied
    yield "scale_decoder_outputs", config.scaled_head
    yield from {"pad_token_id": 0, "decoder_start_token_id": 0}.items()


def _limits(config: T5Config) -> Iterator[str]:
    if config.scaled_head and not config.tied:
        yield "scaled_head = True with tied = False"
    if not config.final_norm:
        yield "final_norm = False"


T5 = Family(
    config=T5Config,
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    prefix="",
    names=NAMES,
    keys={
        "layers": Key("num_layers"),
        "decoder_layers": Key("num_decoder_layers", lambda raw: raw["num_layers"]),
        "hidden_size": Key("d_model"),
        "vocab_size": Key("vocab_size"),
        "max_seq_len": Key("n_positions", 512),
        "attention.heads": Key("num_heads"),
        "attention.head_size": Key("d_kv", 64),
        "mlp.ffn_hidden_size": Key("d_ff"),
        "norm.eps": Key("layer_norm_epsilon", 1e-6),
        "position.buckets": Key("relative_attention_num_buckets", 32),
        "position.max_distance": Key("relative_attention_max_distance", 128),
        "init_std": Key("initializer_range", 0.02),  # which transformers keeps and never reads
        "dropout.attention": Key("dropout_rate", 0.1),
        "dropout.embedding": Key("dropout_rate", 0.1),
        "dropout.hidden": Key("dropout_rate", 0.1),  # the last of a name is what is written
    },
    always={
        "attention.kind": "gqa",
        "attention.num_kv_heads": lambda raw: raw["num_heads"],
        "attention.qkv_bias": False,
        "attention.out_bias": False,
        "attention.scale": 1.0,
        "mlp.kind": "gated",
        "mlp.activation": _activation,
        "mlp.bias": False,
        "norm.kind": "rms",
        "position.kind": "relative",
        "scaled_head": _scaled,
    },
    from_tensor_names={"tied": _tied},
    also_written=_written,
    also_read=("feed_forward_proj", "dense_act_fn", "tie_word_embeddings", "scale_decoder_outputs"),
    ignored=IGNORED | {"is_gated_act": True},
    required={"is_encoder_decoder": True},
    complaints=_odd_activations,
    limits=_limits,
    token_ids={"eos_token_id": 1, "pad_token_id": 0},
)
