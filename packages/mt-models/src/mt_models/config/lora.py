"""Low-rank adapters (LoRA, arXiv:2106.09685) as a part of a model."""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_models.config.tensors import CanonicalTensor, Tensors

ADAPTERS = "*.lora_?.weight"
"""The pattern of adapters' canonical names."""
Target = Literal["q", "k", "v", "out", "gate", "up", "down"]
LAYERS: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v", "out"), "attn"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
}
"""The layer of a block that has each projection."""


class Lora(Section):
    """Adapters beside projections W: y = W x + (alpha / rank) · B A x, where B begins as zero."""

    rank: PositiveInt
    """Features between A and B."""
    alpha: PositiveFloat
    """Adapters are multiplied by alpha / rank."""
    targets: tuple[Target, ...] = ("q", "v")
    """Projections of every block that have adapters: q, k, v, out of attention; gate, up, down of the feed-forward
    layer."""

    @model_validator(mode="after")
    def _targets_are_named_once(self) -> Self:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets {[*self.targets]}: name at least one projection, each once")
        return self

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / self.rank

    def has(self, target: str) -> bool:
        """Whether a projection has an adapter."""
        return target in self.targets

    def tensors(self, block: Tensors) -> Tensors:
        """The adapters' canonical tensors in a block with these tensors. Ranks divide B as the outputs of its
        projection, and A as the inputs."""
        tensors: Tensors = {}
        for target in self.targets:
            name = f"{LAYERS[target]}.{target}"
            (out, into), cut = block[f"{name}.weight"][:2]
            outputs, inputs = (cut if cut is not None and cut.dim == dim else None for dim in (0, 1))
            tensors[f"{name}.lora_a.weight"] = CanonicalTensor((self.rank, into), inputs)
            tensors[f"{name}.lora_b.weight"] = CanonicalTensor((out, self.rank), outputs)
        return tensors
