"""Megatron's name for the loader of Llama and Mistral models, in Hugging Face's format or in Meta's."""

from pathlib import Path

from mt_ckpt.huggingface.families.llama import LLAMA, MISTRAL
from mt_ckpt.huggingface.loader import HuggingFace
from mt_ckpt.meta.loader import PARAMS, Meta
from mt_core.errors import MtError


def llama_mistral(path: Path) -> HuggingFace | Meta:
    """The loader for the format of the directory's files; both at once are refused."""
    formats = [name for name in ("config.json", PARAMS) if (path / name).is_file()]
    if len(formats) == 2:
        problem = f"holds both {formats[0]} (Hugging Face's format) and {PARAMS} (Meta's)"
        raise MtError(str(path), problem, "take --loader hf for the first, or move one of them away")
    if formats == [PARAMS]:
        return Meta(path)
    return HuggingFace(path, {family.model_type: family for family in (LLAMA, MISTRAL)})
