"""Rules between a model's settings, the components installed and other sections. Torch-free."""

from collections.abc import Iterator
from typing import TypeAlias

from mt_core.config.run_config import RunConfig
from mt_core.config.trainable import fused_problems, get_trainable
from mt_core.contracts import DataSection
from mt_core.errors import Problem
from mt_core.plugins import components, did_you_mean
from mt_models.config import GQA, MLA, BertConfig, TransformerConfig
from mt_models.config.tensors import Tensors

ModelRun: TypeAlias = "RunConfig[TransformerConfig, DataSection]"


def problems(config: ModelRun) -> Iterator[Problem]:
    """Everything that a `RunConfig` with a model of mt-models asks for and cannot have."""
    yield from _core(config.model.attention)
    if not hasattr(config, "parallel"):
        return
    if config.model.kind == "gpt":
        yield from _exchange(config)
    else:
        yield from _causal(config)
    if isinstance(config.model, BertConfig):
        yield from _heads(config.model)
    yield from fused_problems(get_trainable(config), group_fused(config.model.canonical_tensors()).values())


def group_fused(tensors: Tensors) -> dict[str, list[str]]:
    """The canonical names in each parameter of a module, by the parameter's name."""
    groups: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(tensor.get_parameter(name), []).append(name)
    return groups


def _causal(config: ModelRun) -> Iterator[Problem]:
    """Context parallelism shares sequences so that causal attention is even, and passes on no padding or bias."""
    if config.parallel.context > 1:
        actual = f"{config.parallel.context}, but not all attention of model.kind = {config.model.kind!r} is causal"
        yield Problem("parallel.context", actual, "allowed: 1")


def _heads(model: BertConfig) -> Iterator[Problem]:
    """Training needs a loss for every weight."""
    if not model.lm_head and not model.task_head:
        yield Problem("model.lm_head", "false: without it there is nothing to train on", "allowed: true")
    if model.pooler and not (model.binary_head or model.task_head):
        actual = "true, but without model.binary_head no loss reaches it"
        yield Problem("model.pooler", actual, "allowed: false, or model.binary_head = true")


def _core(attention: GQA | MLA) -> Iterator[Problem]:
    """The core is an installed one; of sdpa it is known without torch that it cannot cap."""
    core, known = attention.core, ["auto", *components("attention")]
    if core not in known:
        yield Problem("model.attention.core", f"unknown attention core {core!r}", did_you_mean(core, known))
    if core == "sdpa" and attention.softcap is not None:
        actual = "'sdpa' cannot apply model.attention.softcap"
        yield Problem("model.attention.core", actual, "allowed: auto, eager")


def _exchange(config: ModelRun) -> Iterator[Problem]:
    """A ring merges parts of attention itself, the other exchanges call the attention core."""
    special = config.model.attention.special_scores
    if special and config.parallel.context > 1 and config.parallel.cp_comm_type == "ring":
        actual = f"'ring' cannot apply model.attention.{', '.join(special)}"
        yield Problem("parallel.cp_comm_type", actual, "allowed: all_gather, all_to_all")
