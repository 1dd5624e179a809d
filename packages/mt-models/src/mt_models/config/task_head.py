"""Heads of BERT for tasks on whole texts, which fine-tuning adds. Torch-free.

All read the pooler's vector and have one linear layer, `task_head.weight` and `task_head.bias` in checkpoints.
"""

from typing import Annotated, Literal

from pydantic import Field

from mt_core.config.sections import Section

HEADS = ("lm_head", "pooler", "binary_head", "head_activation", "task_head")
"""Fields of a BERT that say which heads it has; the rest is the encoder."""
HEAD_MODULES = ("lm_head", "head", "pooler", "binary_head", "task_head")
"""Modules that heads have, the first part of their tensors' canonical names."""


class ClassificationHead(Section):
    """A logit for each class of a text, or of a pair of texts."""

    kind: Literal["classification"] = "classification"
    classes: Annotated[int, Field(ge=2)]
    """Number of classes."""

    @property
    def logits(self) -> int:
        """Logits of a text."""
        return self.classes


class MultipleChoiceHead(Section):
    """One score for each choice of a question; a sample has a text for each, and their scores compete."""

    kind: Literal["multiple_choice"] = "multiple_choice"

    @property
    def logits(self) -> int:
        """Logits of a text."""
        return 1


class RegressionHead(Section):
    """A number for each text, or pair of texts, such as how alike both are."""

    kind: Literal["regression"] = "regression"

    @property
    def logits(self) -> int:
        """Outputs of a text."""
        return 1


TaskHead = Annotated[ClassificationHead | MultipleChoiceHead | RegressionHead, Field(discriminator="kind")]
