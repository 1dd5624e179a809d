"""Rules between the fields of mt-core's own sections: what does not fit, and values that would."""

from collections.abc import Iterator
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import components, did_you_mean


def problems(config: Any) -> Iterator[Problem]:
    """Everything wrong between the core sections of a valid `RunConfig`."""
    yield from _batch(config)
    yield from _schedule(config)
    if config.optim.name not in (known := components("optimizer")):
        yield Problem("optim.name", f"unknown optimizer {config.optim.name!r}", did_you_mean(config.optim.name, known))
    if config.checkpoint.init is not None:
        yield from _init(config.checkpoint.init)


def _batch(config: Any) -> Iterator[Problem]:
    micro, batch, data = config.batch.micro_batch, config.batch.global_batch, config.parallel.data or 1
    if batch % (micro * data):
        unit = micro * data
        below, above = batch // unit * unit, -(-batch // unit) * unit
        fits = f"{below} or {above}" if below else str(above)
        yield Problem(
            "batch.global_batch", f"{batch} is no multiple of micro_batch {micro} × data {data}", f"allowed: {fits}"
        )


def _schedule(config: Any) -> Iterator[Problem]:
    schedule = config.schedule
    end = schedule.decay_steps or schedule.steps
    if schedule.warmup_steps >= end:
        yield Problem("schedule.warmup_steps", f"{schedule.warmup_steps}", f"allowed: less than the decay's end, {end}")
    if schedule.min_lr > config.optim.lr:
        yield Problem("schedule.min_lr", f"{schedule.min_lr}", f"allowed: at most optim.lr, {config.optim.lr}")
    if schedule.decay == "wsd" and schedule.anneal_steps is None:
        yield Problem("schedule.anneal_steps", 'required by decay = "wsd", but not given', f"allowed: 1 to {end}")
    elif (schedule.anneal_steps or 0) > end:
        yield Problem("schedule.anneal_steps", f"{schedule.anneal_steps}", f"allowed: at most the decay's end, {end}")


def _init(text: str) -> Iterator[Problem]:
    loader, colon, path = text.partition(":")
    known = components("ckpt-loader")
    if not colon or not path:
        yield Problem("checkpoint.init", f"{text!r}", f"allowed: LOADER:PATH with a loader of {', '.join(known)}")
    elif loader not in known:
        yield Problem("checkpoint.init", f"unknown loader {loader!r}", did_you_mean(loader, known))
