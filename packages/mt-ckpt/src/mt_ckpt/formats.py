"""What the formats of mt-ckpt declare: how a checkpoint is recognised. Torch-free."""

from pathlib import Path


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

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a checkpoint of Megatron's that the old classes did not make."""
        return _holds(path, *MEGATRON_FILES) and not _is_legacy(path)


class MegatronLegacyDeclaration:
    """Declares loader `legacy`."""

    looks_for = f"{MegatronCoreDeclaration.looks_for}, written by the old classes"

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether it is a checkpoint of Megatron's that the old classes made."""
        return _holds(path, *MEGATRON_FILES) and _is_legacy(path)


def _holds(path: Path, *patterns: str) -> bool:
    return any(next(path.glob(pattern), None) for pattern in patterns)


def _is_legacy(path: Path) -> bool:
    from mt_ckpt.megatron.legacy.detection import is_legacy

    return is_legacy(path)
