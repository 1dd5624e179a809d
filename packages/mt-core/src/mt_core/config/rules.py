"""Rules between the fields of mt-core's own sections: what does not fit, and values that would."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from mt_core.checkpoint.detection import HUB, HUB_NAME, recognising_loaders
from mt_core.config.run_config import RunConfig, TransformerRun, has_attention
from mt_core.config.sections import CheckpointConfig
from mt_core.config.trainable import get_trainable, pattern_problems
from mt_core.errors import Problem, suggest_file
from mt_core.parallel import layout
from mt_core.plugin_options import find_problems, read_options
from mt_core.plugins import components, did_you_mean, load_declaration

GRADIENTS = {
    "bf16": ("auto", "fp32", "bf16"),
    "fp16": ("auto", "fp32", "fp16"),
    "fp32": ("auto", "fp32", "bf16"),
    "fp64": ("auto",),
}
"""Allowed values of `precision.gradients` for each dtype: fp16 sums overflow unless the loss is scaled, bf16 sums lose
the digits of fp16 gradients, and fp64 runs are for exact comparisons, which narrower sums would spoil."""

DETERMINISTIC_CORES = ("sdpa", "eager")
"""Attention cores that compute the same twice when torch's deterministic algorithms are on: torch then leaves cuDNN's
kernel out, and flash and memory-efficient attention take their deterministic backward passes. Measured on an H200 with
torch 2.11, eight runs each: sdpa in bf16, causal and with documents, differed without and was equal with them;
embedding, norms, cross-entropy and scatter_add were equal with and without."""


def problems(config: RunConfig) -> Iterator[Problem]:
    """Everything wrong between the core sections of a valid `RunConfig`."""
    if has_attention(config):  # layout rules only apply to attention models
        yield from layout.problems(config)
    else:
        yield from layout.pipeline_problems(config)
    yield from _precision(config)
    yield from _lr_schedule(config)
    if config.runtime.deterministic and has_attention(config):
        yield from _deterministic(config)
    if config.optim.name not in (known := components("optimizer")):
        yield Problem("optim.name", f"unknown optimizer {config.optim.name!r}", did_you_mean(config.optim.name, known))
    yield from pattern_problems(get_trainable(config), config.model.canonical_shapes())
    if config.checkpoint.init is not None:
        yield from init_problems(config.checkpoint.init, config.checkpoint.init_options)
    elif config.checkpoint.init_options:
        yield Problem("checkpoint.init_options", "given without checkpoint.init", "set that, or leave the options out")
    if config.checkpoint.save_format != "native":
        yield from _save_format(config.checkpoint)


def _precision(config: RunConfig) -> Iterator[Problem]:
    dtype, gradients = config.precision.dtype, config.precision.gradients
    if gradients not in GRADIENTS[dtype]:
        yield Problem("precision.gradients", f"{gradients} with {dtype}", f"allowed: {', '.join(GRADIENTS[dtype])}")


def _deterministic(config: TransformerRun) -> Iterator[Problem]:
    """Refuse cores that are not known to be deterministic: torch's own kernels raise when they are not, others run."""
    core, others = config.model.attention.core, sorted({*components("attention")} - {*DETERMINISTIC_CORES})
    allowed = f"allowed with runtime.deterministic: {', '.join(DETERMINISTIC_CORES)}"
    if core in others:
        yield Problem("model.attention.core", f"{core!r} is not known to be deterministic", allowed)
    elif core == "auto" and others:
        yield Problem("model.attention.core", f'"auto" may choose {", ".join(others)}', allowed)


def _lr_schedule(config: RunConfig) -> Iterator[Problem]:
    schedule = config.lr_schedule
    end, warmup, anneal = schedule.get_end(config.train.steps), schedule.warmup, schedule.anneal_length
    if warmup >= end:
        yield Problem(f"lr_schedule.warmup_{schedule.unit}", f"{warmup}", f"allowed: less than the decay's end, {end}")
    if schedule.min_lr > config.optim.lr:
        yield Problem("lr_schedule.min_lr", f"{schedule.min_lr}", f"allowed: at most optim.lr, {config.optim.lr}")
    where = f"lr_schedule.anneal_{schedule.unit}"
    if schedule.decay == "wsd" and anneal is None:
        yield Problem(where, 'required by decay = "wsd", but not given', f"allowed: 1 to {end}")
    elif (anneal or 0) > end:
        yield Problem(where, f"{anneal}", f"allowed: at most the decay's end, {end}")


def init_problems(text: str, options: Mapping[str, object] = MappingProxyType({})) -> Iterator[Problem]:
    """What is wrong with `checkpoint.init`: its form, its loader, that loader's options, or a directory that is not
    there."""
    loader, colon, path = text.partition(":")
    known = components("ckpt-loader")
    if not colon or not path:
        loaders = recognising_loaders(Path(text)) if Path(text).exists() else []
        hint = f"did you mean '{loaders[0]}:{text}'? " if loaders else ""
        yield Problem("checkpoint.init", f"{text!r}", f"{hint}allowed: LOADER:PATH with a loader of {', '.join(known)}")
    elif loader not in known:
        yield Problem("checkpoint.init", f"unknown loader {loader!r}", did_you_mean(loader, known))
    elif loader != HUB and not Path(path).exists():
        if HUB in known and HUB_NAME.fullmatch(path):
            hint = f"to fetch it from the Hugging Face hub: '{HUB}:{path}'"
        else:
            hint = suggest_file(Path(path))
        yield Problem("checkpoint.init", f"no directory {path}", hint)
    else:
        declared = {f"loader {loader}": read_options(load_declaration("ckpt-loader", loader))}
        for problem in find_problems(options, declared):
            name = problem.where.removeprefix("--").replace("-", "_")
            yield replace(problem, where=f"checkpoint.init_options.{name}")


def _save_format(checkpoint: CheckpointConfig) -> Iterator[Problem]:
    if not checkpoint.at_end:
        yield Problem("checkpoint.save_format", "hf without at_end", "it is made from the last step: set at_end = true")
    if checkpoint.save_format not in components("ckpt-saver"):
        yield Problem("checkpoint.save_format", "needs mt-ckpt, which is not installed", "pip install mt-ckpt")
