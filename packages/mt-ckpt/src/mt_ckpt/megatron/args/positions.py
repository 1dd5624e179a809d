"""Megatron's `args` of positions and our settings for them.

Of latent attention, args say which kind of rotary positions it has: plain ones, or YaRN's. What these do was measured
with megatron-core 0.16.1: docs/specs/checkpoints.md §3.7.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from mt_ckpt.megatron.args.attention import is_latent
from mt_ckpt.megatron.args.table import Arguments, Row, Settings, Source, spell
from mt_ckpt.megatron.layout import Layout
from mt_models.config import GPTConfig, YaRN

POSITIONS = {"rope": "rope", "learned_absolute": "learned", "none": "none"}
LLAMA3 = {"kind": "llama3", "original_positions": 8192, "low_frequency": 1.0, "high_frequency": 4.0}
"""What --use-rope-scaling means, besides its factor."""
FACTOR = 8.0
"""Factor of --use-rope-scaling for args without a rope_scaling_factor."""
ROPE, YARN = "rope", "yarn"
"""Values of rope_type, for latent attention; absent, it is YaRN."""
YARN_SIZES = {
    "factor": ("rotary_scaling_factor", None),
    "original_positions": ("original_max_position_embeddings", 4096),
    "beta_fast": ("beta_fast", 32),
    "beta_slow": ("beta_slow", 1),
}
"""Our settings of YaRN, their arguments, and what these are where args lack them."""
SHARPNESS = ("mscale", 1.0), ("mscale_all_dim", 0.0)
"""Arguments of how much YaRN sharpens attention, and what they are where a configuration of ours does not say."""


def _write_positions(config: GPTConfig, layout: Layout) -> Arguments:
    """Arguments of positions; Megatron fixes all of Llama 3's scaling but the factor."""
    position, latent = config.position, config.attention.kind == "mla"
    theta = position.theta if position.kind == "rope" else 10_000.0
    scaling = position.scaling if position.kind == "rope" else None
    llama3, linear = (
        scaling if scaling and scaling.kind == kind and not latent else None for kind in ("llama3", "linear")
    )
    exact = llama3 is not None and llama3.model_dump(exclude={"factor"}) == LLAMA3
    return {
        "add_position_embedding": position.kind == "learned",
        "use_rotary_position_embeddings": position.kind == "rope",
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "use_rope_scaling": exact,
        "rope_scaling_factor": llama3.factor if llama3 and exact else FACTOR,
        "rotary_seq_len_interpolation_factor": int(linear.factor) if linear and linear.factor.is_integer() else None,
        **(_write_latent(scaling if scaling and scaling.kind == "yarn" else None) if latent else {}),
    }


def _write_latent(yarn: YaRN | None) -> Arguments:
    """Arguments of latent attention's positions; a factor of 1 changes none."""
    if yarn is None:
        return {"rope_type": ROPE, "rotary_scaling_factor": 1.0, **dict(SHARPNESS)}
    sizes = {theirs: getattr(yarn, ours) for ours, (theirs, _) in YARN_SIZES.items()}
    given = {name: getattr(yarn, name) for name, _ in SHARPNESS if getattr(yarn, name) is not None}
    return {"rope_type": YARN, **sizes, **dict(SHARPNESS), **given}


def _read_positions(source: Source) -> Settings:
    if source.get("position_embedding_type") != "rope":
        return {}
    if is_latent(source):
        return {"position.theta": source.get("rotary_base") or 10_000, "position.scaling": _read_yarn(source)}
    scaling = None
    if source.get("use_rope_scaling"):
        scaling = {**LLAMA3, "factor": source.get("rope_scaling_factor") or FACTOR}
    elif factor := source.get("rotary_seq_len_interpolation_factor"):
        scaling = {"kind": "linear", "factor": factor}
    return {"position.theta": source.get("rotary_base") or 10_000, "position.scaling": scaling}


def _read_yarn(source: Source) -> Settings | None:
    """Settings of YaRN; None where args have it change nothing."""
    if source.get("rope_type") == ROPE or (source.get("rotary_scaling_factor") or 1) == 1:
        return None
    sizes = {ours: source.get(theirs) or default for ours, (theirs, default) in YARN_SIZES.items()}
    mscale, all_dim = (source.get(name) for name, _ in SHARPNESS)
    if (mscale, all_dim) == (1.0, 0.0):  # what we have if nothing is said
        return {"kind": "yarn", **sizes}
    sharp = {"mscale": mscale, "mscale_all_dim": all_dim}
    if not (mscale and all_dim):
        yarn = YaRN.model_construct(factor=sizes["factor"])
        sharp["attention_factor"] = yarn.sharpen(mscale) / yarn.sharpen(all_dim)
    return {"kind": "yarn", **sizes, **sharp}


def unsupported_latent_positions(args: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What args ask of the positions of latent attention and are not clear about, or that it has not."""
    if args.get("position_embedding_type") != ROPE:
        yield (
            f"args.position_embedding_type is {args.get('position_embedding_type')!r}",
            "latent attention always rotates: only 'rope' is implemented",
        )
    kind, factor = args.get("rope_type") or YARN, args.get("rotary_scaling_factor")
    sharp = [name for name, _ in SHARPNESS if args.get(name) is None]
    if kind not in (ROPE, YARN):
        yield f"args.rope_type is {kind!r}", f"implemented: {ROPE}, {YARN}"
    elif kind == YARN and (factor is None or factor < 1):
        yield f"args.rotary_scaling_factor is {factor!r}", "YaRN's must be a number from 1 on"
    elif kind == YARN and factor != 1 and sharp:
        yield from ((f"args.{name} is None", "YaRN's must be a number") for name in sharp)
    elif kind == ROPE and factor not in (None, 1) and args.get("mscale_all_dim"):
        yield (
            f"args.mscale_all_dim is {args['mscale_all_dim']!r}",
            f"Megatron sharpens scores by it: with {ROPE}, only 0",
        )


POSITION_ROWS = (
    spell("position.kind", "position_embedding_type", POSITIONS, "learned_absolute"),
    Row(_write_positions, _read_positions),
)
"""Settings of positions."""
