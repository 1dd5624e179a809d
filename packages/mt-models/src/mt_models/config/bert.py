"""Configuration of `Bert`."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mt_models.config.attention import Unwindowed
from mt_models.config.mlp import Dense, Gated
from mt_models.config.norm import LayerNorm, RMSNorm
from mt_models.config.task_head import TaskHead
from mt_models.config.tensors import CanonicalTensor, Tensors, linear, matrix_parameters, repeat_block
from mt_models.config.transformer import TransformerSection, random_padding

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from mt_models.models.bert import Bert

RANDOM_CHOICES = 3
"""Choices of the random questions of `mt verify`."""


class BertConfig(TransformerSection):
    """An encoder: every token sees all others. Its heads predict hidden words and whether two parts are in order."""

    kind: Literal["bert"] = "bert"
    max_seq_len: PositiveInt
    """Longest sequence in tokens; each position has a learned vector."""
    token_types: NonNegativeInt = 2
    """Kinds of tokens that have a learned vector each, such as those of a first and a second part; 0 for none."""
    attention: Unwindowed
    """Attention of every block."""
    mlp: Annotated[Dense | Gated, Field(discriminator="kind")]
    """Feed-forward layer of every block."""
    norm: Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]
    """Norms of the blocks, of the whole and of the language-model head."""
    norm_place: Literal["before", "after"] = "before"
    """"before" attention and feed-forward layer, and one at the end (Megatron); "after" their output is added, and one
    after the embeddings (the original BERT)."""
    lm_head: bool = True
    """A head that predicts tokens: dense, activation, norm, and the embedding's weight with a bias of its own."""
    head_activation: Literal["gelu", "gelu_tanh", "relu", "squared_relu", "silu"] | None = None
    """Activation of the language-model head; unset, that of `mlp`. Megatron always has the exact "gelu" there."""
    pooler: bool = True
    """A dense layer and tanh over the first token's features."""
    binary_head: bool = True
    """Two logits from the pooler: is the second part really the second?"""
    task_head: TaskHead | None = None
    """What fine-tuning adds instead of the other two heads: a score for each class or choice, or a number."""

    @model_validator(mode="after")
    def _heads_have_what_they_need(self) -> Self:
        if self.binary_head and not self.pooler:
            raise ValueError("binary_head needs pooler")
        if self.task_head and (self.lm_head or self.binary_head or not self.pooler):
            raise ValueError("task_head needs pooler, and stands instead of lm_head and binary_head: turn them off")
        return self

    def build(self, tensor: int = 1) -> "Bert":
        """The module, parameters uninitialised, on the current default device and dtype; whole, for `tensor` ranks."""
        from mt_models.models.bert import Bert

        return Bert(self, tensor)

    def random_inputs(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """Tokens of two types, padding at the end, and the order of two parts; of a task, random labels and choices."""
        import torch

        if self.task_head:
            return self._random_task(tokens_BT, generator)
        text_BT = random_padding(tokens_BT, generator)
        sizes = (tokens_BT.shape, tokens_BT.shape[:1])
        types_BT, is_random_B = (torch.randint(2, size, generator=generator) for size in sizes)
        return {"text": tokens_BT, "types": types_BT, "is_random": is_random_B, "padding_mask": text_BT}

    def _random_task(self, tokens_BT: "Tensor", generator: "Generator") -> "dict[str, Tensor]":
        """Samples of the task: `RANDOM_CHOICES` texts each where its head compares choices."""
        import torch

        head = self.task_head
        classes = head.classes if head and head.kind == "classification" else RANDOM_CHOICES
        if head and head.kind == "multiple_choice":
            tokens_BT = torch.stack([tokens_BT.roll(n, 1) for n in range(RANDOM_CHOICES)], 1)
        mask_BT = random_padding(tokens_BT.flatten(0, -2), generator).view_as(tokens_BT)
        types_BT = torch.randint(2, tokens_BT.shape, generator=generator)
        labels_B = torch.randint(classes, tokens_BT.shape[:1], generator=generator)
        if head and head.kind == "regression":
            labels_B = labels_B + torch.rand(labels_B.shape, generator=generator)
        return {"text": tokens_BT, "types": types_BT, "padding_mask": mask_BT, "labels": labels_B}

    def canonical_tensors(self) -> Tensors:
        """Every tensor in a checkpoint of this model, un-fused and un-padded."""
        D = self.hidden_size
        tensors = self.vocab_tensors("embed") | {"position.weight": CanonicalTensor((self.max_seq_len, D))}
        if self.token_types:
            tensors["token_type.weight"] = CanonicalTensor((self.token_types, D))
        if self.norm_place == "after":
            tensors |= self.norm.tensors("embed_norm", D)
        tensors |= repeat_block(self._block_tensors(), self.layers)
        if self.norm_place == "before":
            tensors |= self.norm.tensors("norm", D)
        if self.lm_head:
            tensors |= linear("lm_head.dense", D, D, bias=True) | self.norm.tensors("lm_head.norm", D)
            tensors |= self.vocab_tensors("head", weight=False, bias=True)
        if self.pooler:
            tensors |= linear("pooler", D, D, bias=True)
        tensors |= linear("binary_head", 2, D, bias=True) if self.binary_head else {}
        return tensors | (linear("task_head", self.task_head.logits, D, bias=True) if self.task_head else {})

    def _block_tensors(self) -> Tensors:
        tensors = self.norm.tensors("attn_norm", self.hidden_size) | self.norm.tensors("mlp_norm", self.hidden_size)
        tensors |= self.attention.tensors("attn", self.hidden_size, self.norm)
        return tensors | self.mlp.tensors("mlp", self.hidden_size)

    def flops_per_token(self, sequence: int) -> float:
        """Training FLOPs per token of the text: 6 · matrix parameters + 12 · layers · heads · head_size · sequence.

        The output layer counts as a matrix; what happens to one token of a sequence, the pooler, is left out.
        """
        matrices = self.layers * matrix_parameters(self._block_tensors())
        if self.lm_head:
            matrices += (self.vocab_size + self.hidden_size) * self.hidden_size
        return 6.0 * matrices + self.attention.score_flops(self.layers * sequence)
