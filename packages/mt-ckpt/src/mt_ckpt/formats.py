"""What the formats of mt-ckpt declare: how a checkpoint is recognised, and which options there are. Torch-free.

A declaration stands for a loader or saver while its format need not be imported: it has the keyword-only parameters of
that, whose types and help are said once, here.
"""

import zipfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import PositiveInt

from mt_core.errors import MtError

FamilyName = Annotated[str | None, "Family to write, such as phi3; else the first that carries the model."]
ShardBytes = Annotated[PositiveInt, "Most bytes of tensors in a file."]
BaseModel = Annotated[str | None, "Name or path of the frozen model, for adapter_config.json."]
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


class PeftSaverDeclaration:
    """Declares saver `peft`."""

    def __init__(self, *, base_model_name: BaseModel = None) -> None: ...


class MetaDeclaration:
    """Declares loader `llama_mistral`, which detection chooses for Meta's files only: `hf` reads the others."""

    looks_for = "params.json and consolidated*"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it has Meta's settings and weights; a copy of a Mistral repository may have the former alone."""
        return _holds(path, "params.json") and _holds(path, "consolidated*")


TRACKER, RELEASE = "latest_checkpointed_iteration.txt", "release"
MEGATRON_FILES = (TRACKER, "mp_rank_*", "metadata.json")
LEGACY_MARK = b"X\x0e\0\0\0language_model"
"""Key of the old classes' model in a file, as a pickle spells it."""
SEARCHED = 1 << 22
"""Bytes of a file from before torch 1.6, in which the pickle precedes the tensors."""


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


def iteration_directory(path: Path) -> Path:
    """The directory of one iteration, for itself or for the root with its tracker (docs/specs/checkpoints.md §1.1)."""
    if not path.is_dir():
        raise MtError(str(path), "no such directory", f"give one that holds {TRACKER}")
    tracker = path / TRACKER
    if not tracker.is_file():
        if any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():
            return path
        raise MtError(str(path), f"holds no {TRACKER}", "give a checkpoint of Megatron, or one of its iterations")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise MtError(str(tracker), f"says {text[:40]!r}", f"an iteration or {RELEASE!r}")
    directory = path / iteration_name(None if text == RELEASE else int(text))
    if not directory.is_dir():
        raise MtError(str(directory), "missing", f"{TRACKER} names it: copy it, or correct the tracker")
    return directory


def iteration_name(iteration: int | None) -> str:
    """The directory of an iteration, and of a model that is none of a run's: iter_0000007, or release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def _is_legacy(path: Path) -> bool:
    """Whether a checkpoint of Megatron's was made by the old classes; not, if its files cannot be looked into."""
    try:
        first = min(iteration_directory(path).glob("mp_rank_*/model_*rng.pt"), default=None)
        return first is not None and LEGACY_MARK in _read_pickle(first)
    except (MtError, OSError, zipfile.BadZipFile):
        return False


def _read_pickle(file: Path) -> bytes:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            return opened.read(SEARCHED)
    with zipfile.ZipFile(file) as opened:
        name = next((name for name in opened.namelist() if name.endswith("data.pkl")), None)
        return opened.read(name) if name else b""
