"""Rules between sections of different packages: the data, the batch and the model. Torch-free."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mt_core.errors import MtError, Problem
from mt_data.batch_sizes import batch_sizes


def problems(config: Any) -> Iterator[Problem]:
    """Batches that change during the run, and data that the model cannot use as it says."""
    yield from _batch(config)
    yield from _samples(config)
    yield from _documents(config)
    yield from _without_effect(config)


def _batch(config: Any) -> Iterator[Problem]:
    """`global_batch` itself is a rule of the layout's; here are `rampup` and `sizes`."""
    batch = config.batch
    if batch.rampup and batch.sizes:
        yield Problem("batch.sizes", "is given beside batch.rampup", "leave one of them out")
        return
    where = "batch.rampup" if batch.rampup else "batch.sizes"
    unit = batch.micro_batch * (config.parallel.data or 1)
    try:
        changing = batch_sizes(batch).sizes() if batch.rampup or batch.sizes else ()
        wrong = [size for size in changing if size % unit]
    except MtError as err:
        yield from (replace(problem, where=where) for problem in err.problems)
        return
    if wrong:
        told = f"{', '.join(map(str, wrong[:3]))}{', …' if len(wrong) > 3 else ''}"
        found = f"{told}: no multiple of micro_batch {batch.micro_batch} × data {config.parallel.data or 1}"
        yield Problem(where, found, f"allowed: multiples of {unit}")
    if batch.sizes and config.train.eval_every and batch.global_batch % unit:
        found = f"{batch.global_batch}, the batch of evaluations, is no multiple of {unit}"
        yield Problem("batch.global_batch", found, f"allowed: multiples of {unit}, or train.eval_every = 0")


SAMPLES = {"gpt": ("gpt", "fim", "sft", "mock"), "bert": ("bert",), "t5": ("t5",)}
"""Kinds of mt-data's samples that each of mt-models' models learns from."""


def _samples(config: Any) -> Iterator[Problem]:
    """Samples of other tasks have no labels for what a model predicts."""
    model, data = config.model, config.data
    known = [kind for kinds in SAMPLES.values() for kind in kinds] + ["ict"]
    if data.kind not in SAMPLES.get(model.kind, known) and data.kind in known:
        found = f"{data.kind!r} samples are not for a model of kind {model.kind!r}"
        yield Problem("data.kind", found, f"allowed: {', '.join(SAMPLES[model.kind])}")
    elif model.kind == data.kind == "bert":
        yield from _two_parts(config)
    elif model.kind == data.kind == "t5":
        yield from _decoder(config)


def _two_parts(config: Any) -> Iterator[Problem]:
    """The binary head says whether two parts are in order, so there must be two."""
    model, data = config.model, config.data
    if model.binary_head and not data.classification_head:
        found = "is false, but model.binary_head learns from samples of two parts"
        yield Problem("data.classification_head", found, "allowed: true, or model.binary_head = model.pooler = false")
    if data.classification_head and model.token_types == 1:
        found = "1, but samples of two parts have tokens of two types"
        yield Problem("model.token_types", found, "allowed: 0, or 2 and more")


def _decoder(config: Any) -> Iterator[Problem]:
    """The decoder's sequences fit as the encoder's do."""
    length, positions, tensor = config.data.decoder_seq_length, config.model.max_seq_len, config.parallel.tensor
    if length > positions:
        found = f"{length} is longer than the model's positions, model.max_seq_len = {positions}"
        yield Problem("data.decoder_seq_length", found, f"at most {positions}")
    if config.parallel.sequence and length % tensor:
        found = f"{length} is no multiple of parallel.tensor {tensor}, as parallel.sequence needs"
        yield Problem("data.decoder_seq_length", found, f"allowed: multiples of {tensor}")


def _documents(config: Any) -> Iterator[Problem]:
    """Options that another one, or the model, leaves without effect."""
    data = config.data
    resets = [name for name in ("reset_position_ids", "reset_attention_mask") if getattr(data, name, False)]
    if getattr(data, "inter_document_masking", False):
        found = "is on beside data.inter_document_masking, which says itself where positions start and who sees whom"
        yield from (Problem(f"data.{name}", found, "turn one of the two off") for name in resets)
    position = getattr(config.model, "position", None)
    if "reset_position_ids" in resets and position is not None and position.kind == "none":
        found = 'is on, but the model has none: model.position.kind = "none"'
        yield Problem("data.reset_position_ids", found, "turn it off")


def _without_effect(config: Any) -> Iterator[Problem]:
    """Options that the chosen parallelism does not look at."""
    parallel, core = config.parallel, getattr(getattr(config.model, "attention", None), "core", "auto")
    if parallel.context > 1 and parallel.cp_comm_type == "ring" and core != "auto":
        allowed = 'allowed: "auto", or parallel.cp_comm_type = all_gather or all_to_all'
        yield Problem("model.attention.core", f"{core!r}, but the ring has its own attention", allowed)
    if parallel.sharding == "fsdp":
        for name in ("overlap_grad_reduce", "overlap_param_gather", "bucket_size"):
            if (value := getattr(parallel, name)) != (default := type(parallel).model_fields[name].default):
                found = f"{value}, but FSDP2 overlaps and groups by blocks itself"
                yield Problem(f"parallel.{name}", found, f"allowed with fsdp: {default}, the default")
