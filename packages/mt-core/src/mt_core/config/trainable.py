"""Which parameters a run trains: the patterns of `optim.trainable` over canonical names. Torch-free."""

from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase

from mt_core.config.run_config import RunConfig
from mt_core.errors import Problem
from mt_core.plugins import did_you_mean

WHERE = "optim.trainable"


def get_trainable(config: RunConfig) -> Sequence[str]:
    """Return the patterns of what a run trains: those of `optim.trainable`, or where that is not set the model's."""
    if config.optim.trainable is not None:
        return config.optim.trainable
    return getattr(config.model, "default_trainable", ("*",))


def is_trainable(name: str, patterns: Sequence[str]) -> bool:
    """Whether a canonical tensor is trained: it matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def pattern_problems(patterns: Sequence[str], names: Collection[str]) -> Iterator[Problem]:
    """Report patterns that match no canonical name, and patterns that leave nothing to train."""
    unmatched = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    for pattern in unmatched:
        yield Problem(WHERE, f"{pattern!r} matches no parameter", did_you_mean(pattern, summarize(names), names))
    if not patterns:
        yield Problem(WHERE, "is empty, so nothing would be trained", 'allowed: patterns of names, or ["*"] for all')


def fused_problems(patterns: Sequence[str], fused: Collection[Sequence[str]]) -> Iterator[Problem]:
    """Report parameters of which only a part would be trained; `fused` has the canonical names in each parameter."""
    split = [names for names in fused if len({is_trainable(name, patterns) for name in names}) > 1]
    if not split:
        return
    first = {flag: [name for name in split[0] if is_trainable(name, patterns) == flag] for flag in (True, False)}
    others = f", and {len(split) - 1} more like them" if len(split) > 1 else ""
    actual = f"{' and '.join(first[True])} would be trained without {' and '.join(first[False])}{others}"
    yield Problem(WHERE, actual, "they are one fused parameter: name all of its parts or none")


def summarize(names: Collection[str]) -> list[str]:
    """Names with `*` for the number of a layer, each once, in their order."""
    starred = [".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names]
    return list(dict.fromkeys(starred))
