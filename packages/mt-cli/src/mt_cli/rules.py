"""Rules between sections of different packages: the data, the batch and the model. Torch-free."""

from collections.abc import Iterator
from dataclasses import replace

from mt_cli.run_config import FullConfig
from mt_cli.vocabulary import find_missing_rows
from mt_core.config.run_config import RunConfig
from mt_core.errors import MtError, Problem
from mt_core.pipeline.schedule_table import get_size, list_problems
from mt_data.batching.batch_sizes import make_batch_sizes
from mt_data.config import BERTData, T5Data
from mt_models.config import BertConfig


def problems(config: FullConfig) -> Iterator[Problem]:
    """Report batches that change during the run in impossible ways, and data that the model cannot use."""
    yield from list_batch_problems(config)
    yield from _samples(config)
    yield from _documents(config)
    yield from _without_effect(config)
    yield from find_missing_rows(config)


def list_batch_problems(config: RunConfig) -> Iterator[Problem]:
    """`global_batch` itself is a rule of the layout's; here are `rampup` and `sizes`."""
    batch = config.batch
    if batch.rampup and batch.sizes:
        yield Problem("batch.sizes", "is given beside batch.rampup", "leave one of them out")
        return
    where = "batch.rampup" if batch.rampup else "batch.sizes"
    unit = batch.micro_batch * (config.parallel.data or 1)
    try:
        changing = make_batch_sizes(batch).sizes() if batch.rampup or batch.sizes else ()
        wrong = [size for size in changing if size % unit]
    except MtError as err:
        yield from (replace(problem, where=where) for problem in err.problems)
        return
    if wrong:
        sizes = f"{', '.join(map(str, wrong[:3]))}{', …' if len(wrong) > 3 else ''}"
        actual = f"{sizes}: no multiple of micro_batch {batch.micro_batch} × data {config.parallel.data or 1}"
        yield Problem(where, actual, f"allowed: multiples of {unit}")
    elif changing and config.parallel.data:
        yield from list_schedule_problems(config, config.parallel.data, where)
    if batch.sizes and config.train.eval_every and batch.global_batch % unit:
        actual = f"{batch.global_batch}, the batch of evaluations, is no multiple of {unit}"
        yield Problem("batch.global_batch", actual, f"allowed: multiples of {unit}, or train.eval_every = 0")


def list_schedule_problems(config: RunConfig, data: int, where: str = "batch.global_batch") -> Iterator[Problem]:
    """Why the schedule of a pipeline does not take the batches of a run, with so many data ranks: of the first size
    that it does not."""
    schedule, unit = config.pipeline.schedule, config.batch.micro_batch * data
    if config.parallel.pipeline == 1:
        return
    for size in make_batch_sizes(config.batch).sizes():
        if wrong := [*list_problems(schedule, get_size(config, size // unit), samples=unit)]:
            yield from (replace(problem, where=where) for problem in wrong)
            return


SAMPLES = {"gpt": ("gpt", "fim", "sft", "mock"), "bert": ("bert",), "t5": ("t5",)}
"""Kinds of mt-data's samples that each of mt-models' models learns from."""


def _samples(config: FullConfig) -> Iterator[Problem]:
    """Samples of other tasks have no labels for what a model predicts."""
    model, data = config.model, config.data
    known = [kind for kinds in SAMPLES.values() for kind in kinds] + ["ict"]
    if data.kind not in SAMPLES.get(model.kind, known) and data.kind in known:
        actual = f"{data.kind!r} samples are not for a model of kind {model.kind!r}"
        yield Problem("data.kind", actual, f"allowed: {', '.join(SAMPLES[model.kind])}")
    elif isinstance(model, BertConfig) and isinstance(data, BERTData):
        if model.task_head:
            actual = "is there, but samples of data.kind = 'bert' have no label for a whole text"
            yield Problem("model.task_head", actual, "data of a task, which mt task prepares; or leave it out")
        yield from _two_parts(model, data)
    elif model.kind == "t5" and isinstance(data, T5Data):
        yield from _decoder(config, data)


def _two_parts(model: BertConfig, data: BERTData) -> Iterator[Problem]:
    """The binary head says whether two parts are in order, so there must be two."""
    if model.binary_head and not data.classification_head:
        actual = "is false, but model.binary_head learns from samples of two parts"
        yield Problem("data.classification_head", actual, "allowed: true, or model.binary_head = model.pooler = false")
    if data.classification_head and model.token_types == 1:
        actual = "1, but samples of two parts have tokens of two types"
        yield Problem("model.token_types", actual, "allowed: 0, or 2 and more")


def _decoder(config: FullConfig, data: T5Data) -> Iterator[Problem]:
    """The decoder's sequences must fit the model and the layout as the encoder's do."""
    length, positions, tensor = data.decoder_seq_length, config.model.max_seq_len, config.parallel.tensor
    if length > positions:
        actual = f"{length} is longer than the model's positions, model.max_seq_len = {positions}"
        yield Problem("data.decoder_seq_length", actual, f"at most {positions}")
    if config.parallel.sequence and length % tensor:
        actual = f"{length} is no multiple of parallel.tensor {tensor}, as parallel.sequence needs"
        yield Problem("data.decoder_seq_length", actual, f"allowed: multiples of {tensor}")


def _documents(config: FullConfig) -> Iterator[Problem]:
    """Options that another one, or the model, leaves without effect."""
    data = config.data
    resets = [name for name in ("reset_position_ids", "reset_attention_mask") if getattr(data, name, False)]
    if getattr(data, "inter_document_masking", False):
        actual = "is on beside data.inter_document_masking, which says itself where positions start and who sees whom"
        yield from (Problem(f"data.{name}", actual, "turn one of the two off") for name in resets)
    position = getattr(config.model, "position", None)
    if "reset_position_ids" in resets and position is not None and position.kind == "none":
        actual = 'is on, but the model has none: model.position.kind = "none"'
        yield Problem("data.reset_position_ids", actual, "turn it off")


def _without_effect(config: FullConfig) -> Iterator[Problem]:
    """Options that the chosen parallelism does not look at."""
    parallel, core = config.parallel, getattr(getattr(config.model, "attention", None), "core", "auto")
    if parallel.context > 1 and parallel.cp_comm_type == "ring" and core != "auto":
        allowed = 'allowed: "auto", or parallel.cp_comm_type = all_gather or all_to_all'
        yield Problem("model.attention.core", f"{core!r}, but the ring has its own attention", allowed)
    if parallel.sharding == "fsdp":
        for name in ("overlap_grad_reduce", "overlap_param_gather", "bucket_size"):
            if (value := getattr(parallel, name)) != (default := type(parallel).model_fields[name].default):
                actual = f"{value}, but FSDP2 overlaps and groups by blocks itself"
                yield Problem(f"parallel.{name}", actual, f"allowed with fsdp: {default}, the default")
