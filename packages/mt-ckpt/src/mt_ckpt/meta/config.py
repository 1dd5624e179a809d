"""Meta's and Mistral's params.json as `GPTConfig`.

The file does not say how long sequences may be, nor by how much `use_scaled_rope` stretches positions: the releases do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

SIZES = ("dim", "n_layers", "n_heads")
KNOWN = (
    *(*SIZES, "n_kv_heads", "head_dim", "hidden_dim", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"),
    *("vocab_size", "use_scaled_rope", "rope_scaling_factor", "sliding_window", "max_seq_len"),
)
IRRELEVANT = ("max_batch_size", "model_parallel_size", "model_type")
"""Keys that change nothing about what the model computes."""
SMALL = 3072
"""The widest of Llama 3.2's models, which stretch positions 32 times; 3.1's and 3.3's are wider and stretch 8 times."""
FIRST_POSITIONS = 8192
"""Tokens of the sequences that Llama 3 was first trained on."""


def read_params(raw: Mapping[str, Any], where: Path, *, rows: int, tied: bool) -> tuple[GPTConfig, str | None]:
    """The configuration and a note of what was guessed; `rows` of the embedding stand for a vocabulary of -1.

    One `MtError` names everything that is missing or not implemented.
    """
    raise_if(_problems(raw, str(where)))
    heads, dim = raw["n_heads"], raw["dim"]
    positions = raw.get("max_seq_len") or _positions(raw)
    window = raw.get("sliding_window")
    theta = raw.get("rope_theta") or 10_000.0
    scaling, factor = None, raw.get("rope_scaling_factor") or (32.0 if dim <= SMALL else 8.0)
    if raw.get("use_scaled_rope"):
        scaling = {"kind": "llama3", "factor": factor, "original_positions": FIRST_POSITIONS}
    values = {
        "layers": raw["n_layers"],
        "hidden_size": dim,
        "vocab_size": rows if raw.get("vocab_size", -1) == -1 else raw["vocab_size"],
        "max_seq_len": positions,
        "attention": {
            "heads": heads,
            "num_kv_heads": raw.get("n_kv_heads") or heads,
            "head_size": raw.get("head_dim") or dim // heads,
            "window": window if window and window < positions else None,
        },
        "mlp": {"kind": "gated", "ffn_hidden_size": raw.get("hidden_dim") or hidden(raw), "activation": "silu"},
        "norm": {"kind": "rms", "eps": raw.get("norm_eps", 1e-5)},
        "position": {"kind": "rope", "theta": theta, "scaling": scaling},
        "tied": tied,
    }
    guessed = [] if raw.get("max_seq_len") else [f"sequences of {positions} tokens"]
    guessed += [f"positions stretched {factor:g} times"] if scaling and not raw.get("rope_scaling_factor") else []
    try:
        config = GPTConfig.model_validate(values)
    except ValidationError as err:
        raise MtError.from_problems(
            Problem(str(where), e["msg"].removeprefix("Value error, "), "copy it again") for e in err.errors()
        ) from None
    return config, f"not in params.json, taken from the releases: {' and '.join(guessed)}" if guessed else None


def hidden(raw: Mapping[str, Any]) -> int:
    """Hidden features of the feed-forward layer: 8/3 of the width, times a factor, up to a multiple.

    Source: docs/specs/checkpoints.md §5.1.
    """
    size, multiple = int(8 * raw["dim"] / 3), raw.get("multiple_of", 256)
    return multiple * -(-int((raw.get("ffn_dim_multiplier") or 1) * size) // multiple)


def _problems(raw: Mapping[str, Any], where: str) -> list[Problem]:
    missing = [
        Problem(where, f"{key} is {raw[key]!r}" if key in raw else f"has no {key}", "it must be a positive integer")
        for key in SIZES
        if type(raw.get(key)) is not int or raw[key] < 1
    ]
    unknown = [
        Problem(where, f"asks for {key}", "mt reads dense Llama and Mistral models; for others, take --loader hf")
        for key in raw
        if key not in KNOWN + IRRELEVANT and raw[key]
    ]
    return missing + unknown


def _positions(raw: Mapping[str, Any]) -> int:
    """Longest sequence of the release that has such parameters."""
    if raw.get("use_scaled_rope"):
        return 131_072  # Llama 3.1 and later
    if raw.get("hidden_dim"):
        return 32_768  # Mistral
    if raw.get("rope_theta"):
        return 8192 if raw["rope_theta"] < 1e6 else 16_384  # Llama 3, Code Llama
    return 4096 if raw.get("norm_eps", 1e-5) >= 1e-5 else 2048  # Llama 2, Llama
