"""A part of a model, seen as a model: what some stages of a pipeline have of it, for counts made for whole models.

Embedding and positions lie before the layers in a model's list of canonical tensors, last norm and head behind them. A
head that uses the embedding's weight needs a copy of it where the two are on different ranks.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mt_core.config.run_config import PlannedRun
from mt_core.config.sections import PipelineConfig
from mt_core.contracts import PlannedModelConfig
from mt_core.parallel.layout import Layout
from mt_core.planning.layer_costs import LayerCosts, RankShape, get_layer_costs
from mt_core.planning.parameters import find_layer

if TYPE_CHECKING:
    from mt_core.parallel.cuts import TensorCut
    from mt_core.pipeline.layout_string import Stage


@dataclass(frozen=True, slots=True)
class StageModel:
    """Some layers of a model, and its ends if they are there."""

    whole: PlannedModelConfig
    numbers: tuple[int, ...]
    """The layers."""
    embedding: bool
    loss: bool

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.numbers)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.whole.hidden_size

    @property
    def vocab_size(self) -> int:
        """Logits of a token; none without the loss."""
        return self.whole.vocab_size if self.loss else 0

    def canonical_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensors that are here."""
        shapes, before, kept = self.whole.canonical_shapes(), True, set(self.numbers)
        here: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            number = find_layer(name)
            before = before and number is None
            if (number in kept) if number is not None else (self.embedding if before else self.loss):
                here[name] = shape
        return here | ({"embed.weight": shapes["embed.weight"]} if self.loss and is_tied(self.whole) else {})

    def canonical_cuts(self) -> "Mapping[str, TensorCut]":
        """How ranks divide each tensor of the whole model."""
        return self.whole.canonical_cuts()

    def flops_per_token(self, sequence: int, /) -> float:
        """Training FLOPs per token in the layers, and in the head if it is here."""
        head = 6 * self.whole.vocab_size * self.whole.hidden_size if self.loss else 0
        return self.layer_flops(sequence, self.numbers) + head

    def layer_flops(self, sequence: int, layers: Sequence[int], /) -> float:
        """The part of them in these layers of the whole model."""
        return self.whole.layer_flops(sequence, layers)

    def layer_costs(self, shape: RankShape, layers: Sequence[int] | None = None, /) -> LayerCosts:
        """What one of the layers costs a rank, on average."""
        return self.whole.layer_costs(shape, layers or self.numbers)


def cut_run(config: PlannedRun, stages: "Sequence[Stage]") -> Any:
    """The configuration of what some stages compute, without a pipeline."""
    model = StageModel(
        config.model,
        tuple(number for stage in stages for number in stage.layers),
        any(stage.embedding for stage in stages),
        any(stage.loss for stage in stages),
    )
    return drop_pipeline(config).model_copy(update={"model": model})


def get_kind(part: Any, layout: Layout) -> Hashable:
    """What is equal of parts of one model, made by `cut_run`, that compute, hold and exchange the same in a pass."""
    model, length = part.model, part.data.seq_length
    flops = model.flops_per_token(0), model.flops_per_token(length)
    return model.layers, model.embedding, model.loss, flops, get_layer_costs(part, layout)


def drop_pipeline(config: PlannedRun) -> PlannedRun:
    """A configuration without its pipeline: what one stage's ranks run."""
    parallel = config.parallel.model_copy(update={"pipeline": 1})
    return config.model_copy(update={"parallel": parallel, "pipeline": PipelineConfig()})


def is_tied(model: PlannedModelConfig) -> bool:
    """Whether the head uses the embedding's weight."""
    return "head.weight" not in model.canonical_shapes()


def count_ends(model: PlannedModelConfig | StageModel) -> tuple[int, int]:
    """1 for an embedding that is there, and 1 for a head."""
    return (int(model.embedding), int(model.loss)) if isinstance(model, StageModel) else (1, 1)
