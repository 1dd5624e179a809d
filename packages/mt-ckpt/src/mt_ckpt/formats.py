"""What the formats of mt-ckpt declare: how a checkpoint is recognised, and which options there are. Torch-free.

A declaration stands for a loader or saver while its format need not be imported: it has the keyword-only parameters of
that, whose types and help are said once, here.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import PositiveInt

FamilyName = Annotated[str | None, "Family to write, such as phi3; else the first that carries the model."]
ShardBytes = Annotated[PositiveInt, "Most bytes of tensors in a file."]
SHARD_BYTES = 5 * 10**9
"""Largest file of a checkpoint in Hugging Face format if no other size is asked for."""

VocabRows = Annotated[int | None, "Rows of the embedding that are no padding."]
ArgsFile = Annotated[Path | None, "JSON file of Megatron's arguments that the files lack."]
Heads = Annotated[int | None, "Heads of a model whose files have no args, such as NGC's."]

TensorRanks = Annotated[int, "Tensor ranks to cut for."]
Stages = Annotated[int, "Pipeline stages to cut for."]
Chunks = Annotated[int, "Chunks of each pipeline stage."]
EncoderStages = Annotated[int | None, "How many of the stages hold a T5's encoder."]
ExpertRanks = Annotated[int, "Ranks that share experts."]
FileFormat = Annotated[Literal["torch", "torch_dist"], "A file for each rank, or chunks for any."]
Iteration = Annotated[int | None, "Iteration to mark it as; else a release."]
LayerNames = Annotated[Literal["transformer_engine", "local"], "Whose names the files bear."]
GroupedExperts = Annotated[bool, "Experts under TEGroupedMLP's names."]


class NoOptions:
    """Declares a loader or saver without options, which is used by its name only."""


class NativeDeclaration:
    """Declares loader `native`."""

    looks_for = "meta.json or step-*"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a run or a step."""
        return _holds(path, "meta.json", "step-*")


class HuggingFaceDeclaration:
    """Declares loader `hf`."""

    looks_for = "config.json"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it has Hugging Face's configuration."""
        return _holds(path, "config.json")


class HuggingFaceSaverDeclaration:
    """Declares saver `hf`."""

    def __init__(self, *, target_model_type: FamilyName = None, shard_bytes: ShardBytes = SHARD_BYTES) -> None: ...


class MetaDeclaration:
    """Declares loader `llama_mistral`, which detection chooses for Meta's files only: `hf` reads the others."""

    looks_for = "params.json and consolidated*"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it has Meta's settings and weights; a copy of a Mistral repository may have the former alone."""
        return _holds(path, "params.json") and _holds(path, "consolidated*")


MEGATRON_FILES = ("latest_checkpointed_iteration.txt", "mp_rank_*", "metadata.json")


class MegatronCoreDeclaration:
    """Declares loader `core`."""

    looks_for = " or ".join(MEGATRON_FILES)

    def __init__(self, *, true_vocab_size: VocabRows = None, megatron_args: ArgsFile = None) -> None: ...

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a checkpoint of Megatron's that the old classes did not make."""
        return _holds(path, *MEGATRON_FILES) and not _is_legacy(path)


class MegatronCoreSaverDeclaration:
    """Declares saver `core`."""

    def __init__(
        self,
        *,
        target_tensor_parallel_size: TensorRanks = 1,
        target_pipeline_parallel_size: Stages = 1,
        target_encoder_pipeline_parallel_size: EncoderStages = None,
        target_virtual_pipeline_parallel_size: Chunks = 1,
        target_expert_parallel_size: ExpertRanks = 1,
        target_ckpt_format: FileFormat = "torch",
        target_iteration: Iteration = None,
        saver_transformer_impl: LayerNames = "transformer_engine",
        moe_grouped_gemm: GroupedExperts = False,
    ) -> None: ...


class MegatronLegacyDeclaration:
    """Declares loader `legacy`."""

    looks_for = f"{MegatronCoreDeclaration.looks_for}, written by the old classes"

    def __init__(self, *, num_attention_heads: Heads = None, true_vocab_size: VocabRows = None) -> None: ...

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a checkpoint of Megatron's that the old classes made."""
        return _holds(path, *MEGATRON_FILES) and _is_legacy(path)


class MegatronLegacySaverDeclaration:
    """Declares saver `legacy`."""

    def __init__(
        self,
        *,
        target_tensor_parallel_size: TensorRanks = 1,
        target_pipeline_parallel_size: Stages = 1,
        target_encoder_pipeline_parallel_size: EncoderStages = None,
        target_virtual_pipeline_parallel_size: Chunks = 1,
    ) -> None: ...


def _holds(path: Path, *patterns: str) -> bool:
    return any(next(path.glob(pattern), None) for pattern in patterns)


def _is_legacy(path: Path) -> bool:
    from mt_ckpt.megatron.legacy.detection import is_legacy

    return is_legacy(path)
