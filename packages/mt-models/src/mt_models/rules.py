"""Rules between a GPT's settings, the components installed and other sections. Torch-free."""

from collections.abc import Iterator
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import components, did_you_mean


def problems(config: Any) -> Iterator[Problem]:
    """Everything that a `RunConfig` with a GPT asks for and cannot have."""
    yield from _core(config.model.attention)
    if hasattr(config, "parallel"):
        yield from _exchange(config)
        yield from _balance(config)


def _core(attention: Any) -> Iterator[Problem]:
    """The core is an installed one; of sdpa it is known without torch that it cannot cap."""
    core, known = attention.core, ["auto", *components("attention")]
    if core not in known:
        yield Problem("model.attention.core", f"unknown attention core {core!r}", did_you_mean(core, known))
    if core == "sdpa" and attention.softcap is not None:
        found = "'sdpa' cannot apply model.attention.softcap"
        yield Problem("model.attention.core", found, "allowed: auto, eager")


def _exchange(config: Any) -> Iterator[Problem]:
    """A ring merges parts of attention itself, the other exchanges call the attention core."""
    special = config.model.attention.special_scores
    if special and config.parallel.context > 1 and config.parallel.context_exchange == "ring":
        found = f"'ring' cannot apply model.attention.{', '.join(special)}"
        yield Problem("parallel.context_exchange", found, "allowed: all_gather, all_to_all")


def _balance(config: Any) -> Iterator[Problem]:
    """The balance loss is one of whole sequences, and a rank that shares them sees only a part."""
    mlp, parallel = config.model.mlp, config.parallel
    if mlp.kind == "moe" and mlp.balance and (parallel.context > 1 or parallel.sequence):
        found = f"{mlp.balance} needs whole sequences, which ranks share with parallel.context and parallel.sequence"
        yield Problem("model.mlp.balance", found, "allowed: 0, or parallel.context = 1 and parallel.sequence = false")
