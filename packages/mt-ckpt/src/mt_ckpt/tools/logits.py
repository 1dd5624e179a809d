"""Whether two checkpoints are one model: the logits of both on the same tokens."""

from collections.abc import Iterator
from pathlib import Path

from mt_ckpt.conversion.verify import (
    Comparison,
    compare,
    fixed_tokens,
    has_transformers_model,
    our_logits,
    transformers_logits,
)
from mt_ckpt.tools.configurations import changed_settings
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError


def compare_logits(
    left: Path, right: Path, *, loaders: tuple[str | None, str | None] = (None, None)
) -> Iterator[Comparison]:
    """A in mt with B in mt, and each side that transformers can read with its model there; fp32, one at a time."""
    a, b = open_checkpoint(left, loaders[0]), open_checkpoint(right, loaders[1])
    for path, ours, theirs in changed_settings(a, b):
        if path in ("kind", "vocab_size"):
            raise MtError(f"{right}: {path}", f"{theirs}, but {left} has {ours}", "compare models with the same tokens")
    tokens_BT = fixed_tokens(min((a.config(), b.config()), key=lambda config: config.max_seq_len))
    logits = []
    for label, path, loader in (("A", left, a), ("B", right, b)):
        logits.append(our_logits(loader, tokens_BT))
        if has_transformers_model(loader):
            theirs_BTV = transformers_logits(path, tokens_BT)
            yield compare(f"{label} in transformers", f"{label} in mt", theirs_BTV, logits[-1])
    yield compare("A in mt", "B in mt", *logits)
