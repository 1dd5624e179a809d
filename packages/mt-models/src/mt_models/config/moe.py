"""A mixture of experts as a part of a model: the router, the experts and the shared expert."""

from collections.abc import Iterator
from math import ceil
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mt_core.config.sections import Section
from mt_core.parallel.cuts import CutSize, TensorCut
from mt_core.planning.layer_costs import LayerCosts, RankShape, SavedTensor
from mt_models.config.mlp import GATE_UP, Gated, gated_costs
from mt_models.config.tensors import CanonicalTensor, Tensors, linear

ROUTED_TRAFFIC = 7
"""Elements read and written for each feature of an expert's row: gathered 2, put back 2, weighted 2, added up 1."""


class MoE(Section):
    """A mixture of gated feed-forward layers: each token passes through the `top_k` experts that its router prefers."""

    kind: Literal["moe"] = "moe"
    ffn_hidden_size: PositiveInt
    """Hidden features of each expert."""
    experts: PositiveInt
    """Feed-forward layers to choose from."""
    top_k: PositiveInt
    """Experts of a token."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Function of the gate."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What makes scores, the weights of experts, of the router's logits: a softmax, or each by itself a sigmoid."""
    normalized: bool = True
    """The scores of a token's experts are divided by their sum. With a softmax that is one over their logits alone,
    after the choice; otherwise it is one over all experts', before it."""
    scaling_factor: PositiveFloat = 1.0
    """The weights of a token's experts are multiplied by this."""
    groups: PositiveInt = 1
    """Equal groups of neighbouring experts, of which a token's may be in `top_groups` only."""
    top_groups: PositiveInt | None = None
    """Groups that a token's experts may be in; unset, all."""
    group_best: PositiveInt = 2
    """Experts of a group whose scores, the best ones, add up to that of the group."""
    expert_bias: bool = False
    """Each expert's score gets a number of its own before experts are chosen, not before they are weighted. After each
    step it grows where an expert got fewer tokens than the mean, and shrinks where it got more."""
    expert_bias_update_rate: NonNegativeFloat = 1e-3
    """By how much it changes in a step."""
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """In training each feature that the router sees is multiplied by a random number in 1 − jitter … 1 + jitter."""
    aux_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the loss that evens out how often experts are chosen."""
    aux_loss_scope: Literal["sequence", "micro_batch", "global_batch"] = "sequence"
    """In what it evens them out: each sequence, a micro-batch, or what all ranks have had of the step so far. Of the
    three only the sequence does not depend on how the batch is cut."""
    z_loss_coeff: NonNegativeFloat = 0.0
    """Coefficient of the loss that keeps logits small: the square of the logarithm of the sum of their exponentials."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes so many times as many tokens of a sequence as it would if all were chosen equally
    often, rounded up, and drops the others, which are left with their remaining experts. Unset, nothing is dropped."""
    drop_policy: Literal["probability", "position"] = "probability"
    """Which tokens an expert that is full drops: those of the lowest weights, or the last ones of the sequence."""
    pad_to_capacity: bool = False
    """In training every expert computes as many rows as `capacity_factor` lets it take, zeros where it has fewer, so
    that shapes and exchanges are the same in every step."""
    shared_ffn_hidden_size: PositiveInt | None = None
    """Hidden features of the shared expert, through which every token passes; unset, there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a number in 0 … 1, the sigmoid of a projection of the token."""

    dense_layers: NonNegativeInt = 0
    """The first layers of the model that have no experts but one gated layer, through which every token passes."""
    dense_ffn_hidden_size: PositiveInt | None = None
    """Hidden features of those layers; they have the activation of the experts."""

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if problems := [*self._router_problems()]:
            raise ValueError("; ".join(problems))
        return self

    def _router_problems(self) -> Iterator[str]:
        if (self.dense_layers > 0) != (self.dense_ffn_hidden_size is not None):
            yield f"dense_layers {self.dense_layers} and dense_ffn_hidden_size {self.dense_ffn_hidden_size}: set both"
        if self.top_k > self.experts:
            yield f"top_k {self.top_k} is more than experts {self.experts}"
        if self.top_k == 1 and self.normalized:
            yield "with top_k 1 the only weight is always 1, and the router learns nothing: normalized = false"
        if self.expert_bias and self.score != "sigmoid":
            yield f'expert_bias needs score = "sigmoid", not {self.score!r}'
        if self.aux_loss_scope != "sequence" and not self.aux_loss_coeff:
            yield f"aux_loss_scope {self.aux_loss_scope!r} needs a loss: aux_loss_coeff is 0"
        if self.shared_gate and self.shared_ffn_hidden_size is None:
            yield "shared_gate needs a shared expert: shared_ffn_hidden_size is unset"
        if self.capacity_factor is None:
            yield from self._capacity_problems()
        if self.experts % self.groups:
            yield f"groups {self.groups} do not divide experts {self.experts}"
        elif self.top_groups is not None:
            yield from self._group_problems(self.top_groups, self.experts // self.groups)

    def _capacity_problems(self) -> Iterator[str]:
        if "drop_policy" in self.model_fields_set and self.drop_policy != "probability":
            yield "drop_policy needs a capacity: without capacity_factor nothing is dropped"
        if self.pad_to_capacity:
            yield "pad_to_capacity needs a capacity: without capacity_factor there is none"

    def _group_problems(self, top_groups: int, size: int) -> Iterator[str]:
        if top_groups > self.groups:
            yield f"top_groups {top_groups} is more than groups {self.groups}"
        elif self.top_k > top_groups * size:
            yield f"top_k {self.top_k} is more than the {top_groups * size} experts of top_groups {top_groups}"
        if self.group_best > size:
            yield f"group_best {self.group_best} is more than the {size} experts of a group"

    @property
    def shared(self) -> Gated | None:
        """The shared expert as a layer by itself."""
        if self.shared_ffn_hidden_size is None:
            return None
        return Gated(ffn_hidden_size=self.shared_ffn_hidden_size, activation=self.activation)

    @property
    def dense(self) -> Gated | None:
        """What the first layers have instead of experts."""
        if self.dense_ffn_hidden_size is None:
            return None
        return Gated(ffn_hidden_size=self.dense_ffn_hidden_size, activation=self.activation)

    @property
    def has_aux_losses(self) -> bool:
        """Whether training adds losses of the router's to that of the labels."""
        return bool(self.aux_loss_coeff or self.z_loss_coeff)

    def tensors(self, name: str, size: int) -> Tensors:
        """The canonical tensors over `size` features: the router's, which all ranks have, and stacks of the experts'.

        The stacks are divided over the expert axis, and hidden features over the tensor axis if it shares experts.
        """
        experts, features = self.experts, self.ffn_hidden_size
        rows, columns = (TensorCut(0, axis="expert", inner_dim=dim) for dim in (1, 2))
        tensors = {f"{name}.router.weight": CanonicalTensor((experts, size))}
        if self.expert_bias:
            tensors[f"{name}.router.bias"] = CanonicalTensor((experts,))
        for projection in GATE_UP.parts:
            tensors[f"{name}.experts.{projection}.weight"] = CanonicalTensor((experts, features, size), rows, GATE_UP)
        tensors[f"{name}.experts.down.weight"] = CanonicalTensor((experts, size, features), columns)
        if self.shared is not None:
            tensors |= self.shared.tensors(f"{name}.shared", size)
        return tensors | (linear(f"{name}.shared_gate", 1, size, bias=False) if self.shared_gate else {})

    def cut_sizes(self, key: str) -> list[CutSize]:
        """The number of experts, which expert ranks divide, and hidden features, which tensor ranks do."""
        sizes = [
            CutSize(f"{key}.experts", self.experts, axis="expert"),
            CutSize(f"{key}.ffn_hidden_size", self.ffn_hidden_size, axis="expert_tensor"),
        ]
        if self.shared_ffn_hidden_size is not None:
            sizes.append(CutSize(f"{key}.shared_ffn_hidden_size", self.shared_ffn_hidden_size))
        if self.dense_ffn_hidden_size is not None:
            sizes.append(CutSize(f"{key}.dense_ffn_hidden_size", self.dense_ffn_hidden_size))
        return sizes

    def flops_per_token(self, size: int) -> int:
        """Training FLOPs of a token in the router and in the experts that it passes through, the shared one too."""
        shared = self.shared.flops_per_token(size) if self.shared is not None else 0
        return 6 * (self.experts + self.shared_gate) * size + self.expert_flops(size) + shared

    def costs(self, shape: RankShape, size: int) -> LayerCosts:
        """The costs of the mixture between its norm and the residual sum, if experts are chosen equally often.

        Where tensor ranks have whole experts they compute the same, unless they divide the sequence. Padding to a
        capacity is computed, kept and exchanged as any row.
        """
        tokens, shared = shape.tokens / shape.sequence_parts, shape.expert_tensor > 1
        mixed = shape.tokens if shared else tokens  # what one rank's experts see
        repeated = 1 if shared else shape.tensor / shape.sequence_parts
        rows = self._count_rows(shape, mixed)
        routed = rows * size * shape.element_size
        mixture = LayerCosts(
            saved=(
                *self._saved_by_router(shape, tokens, size),
                *self._saved_by_dispatcher(shape, tokens, mixed, rows),
                SavedTensor("rows into and out of experts", 2 * routed),
            ),
            forward_bytes=ROUTED_TRAFFIC * routed,
            backward_bytes=ROUTED_TRAFFIC * routed,
            tensor_reductions=int(shared),
            repeated_flops=self.expert_flops(size) * (repeated * rows / (mixed * self.top_k) - 1),
            routed_bytes=routed,
            mixed_bytes=mixed * size * shape.element_size,
        ) + gated_costs(shape, rows * self.ffn_hidden_size / shape.expert_tensor)
        return mixture if self.shared is None else mixture + self._shared_costs(shape, tokens, size)

    def _shared_costs(self, shape: RankShape, tokens: float, size: int) -> LayerCosts:
        """The costs of the shared expert, whose output is added to so many tokens; a gate multiplies it first."""
        assert self.shared is not None
        features, gate = tokens * size * shape.element_size, int(self.shared_gate)
        added = LayerCosts(
            saved=(SavedTensor("shared expert's gate and what it multiplies", gate * features * (1 + 1 / size)),),
            forward_bytes=(3 + 2 * gate) * features,  # read twice and written; multiplied before
            backward_bytes=3 * gate * features,
        )
        return self.shared.costs(shape, size) + added

    def _saved_by_router(self, shape: RankShape, tokens: float, size: int) -> Iterator[SavedTensor]:
        wide, narrow = shape.wide_size, shape.element_size < shape.wide_size
        rows, choices = tokens * self.top_k, tokens * self.experts
        after = self.normalized and self.score == "softmax"
        probabilities = rows if after else choices
        probabilities += rows + tokens if self.normalized and not after else 0  # what is divided, and by what
        sequences = shape.tokens * shape.context / shape.seq_length
        if (
            self.aux_loss_coeff
        ):  # shares of choices of each expert, tokens of sequences, and what sigmoids are divided by
            shares = self.experts * (sequences if self.aux_loss_scope == "sequence" else 1)
            probabilities += choices + shares + sequences + (tokens if self.score == "sigmoid" else 0)
        if self.z_loss_coeff:
            probabilities += choices + tokens + sequences
        limited = self.top_groups not in (None, self.groups)
        apart = narrow or not after or self.scaling_factor != 1
        yield SavedTensor("input of the router, widened", tokens * size * wide if narrow else 0)
        yield SavedTensor("input of the router, jittered", tokens * size * wide if self.jitter else 0)
        yield SavedTensor("weights of choices", rows * shape.element_size if apart else 0)
        yield SavedTensor("groups that are left out", tokens * self.groups if limited else 0)
        yield SavedTensor("probabilities, and choices", probabilities * wide + rows * 8)

    def _count_rows(self, shape: RankShape, mixed: float) -> float:
        """The rows of the experts that a rank's tokens pass through, `mixed` in number."""
        if not self.pad_to_capacity or self.capacity_factor is None:
            return mixed * self.top_k
        sequences = shape.tokens * shape.context / shape.seq_length
        capacity = ceil(shape.seq_length * self.top_k / self.experts * self.capacity_factor)
        return self.experts * min(sequences * capacity, mixed)

    def _saved_by_dispatcher(self, shape: RankShape, tokens: float, mixed: float, rows: float) -> Iterator[SavedTensor]:
        """The orders of choices and of rows, and what is gathered of those of other ranks."""
        gathers = shape.expert > 1 and shape.token_dispatcher == "all_gather"
        choices = mixed * self.top_k * (shape.expert if gathers else 1)
        exchanged = 2 if shape.expert > 1 and not gathers else 0
        ordered = rows if self.pad_to_capacity else choices
        yield SavedTensor("orders of choices", 8 * (choices + ordered + exchanged * rows))
        yield SavedTensor(
            "weights of other ranks' choices", choices * shape.wide_size if choices > tokens * self.top_k else 0
        )

    def expert_flops(self, size: int) -> int:
        """Training FLOPs of a token in its experts, but for the shared one."""
        return 6 * self.top_k * 3 * self.ffn_hidden_size * size
