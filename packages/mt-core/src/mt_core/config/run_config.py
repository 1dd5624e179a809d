"""The whole configuration of a run as one type, generic in its model and data sections. Torch-free.

mt-core knows the other sections; `mt_cli.run_config` puts in what is installed of models and data.
"""

from typing import Any, Generic, Self, TypeGuard

from pydantic import ConfigDict, ModelWrapValidatorHandler, model_validator
from typing_extensions import TypeVar

from mt_core.config.sections import (
    BatchConfig,
    CheckpointConfig,
    LogConfig,
    LRScheduleConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    PrecisionConfig,
    RecomputeConfig,
    RuntimeConfig,
    Section,
    TrainConfig,
)
from mt_core.contracts import DataSection, ModelConfig, PlannedModelConfig, TransformerModelConfig

ModelT = TypeVar("ModelT", bound=ModelConfig, default=ModelConfig, covariant=True)
DataT = TypeVar("DataT", bound=DataSection, default=DataSection, covariant=True)


class RunConfig(Section, Generic[ModelT, DataT]):
    """Everything that decides what a run does."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    model: ModelT
    data: DataT
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    lr_schedule: LRScheduleConfig = LRScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    parallel: ParallelConfig = ParallelConfig()
    pipeline: PipelineConfig = PipelineConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _resolve_fractions(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Replace fractions of the schedule: whatever reads a validated tree, or a saved one, sees steps and rates."""
        config = handler(values)
        schedule = config.lr_schedule.resolve_fractions(steps=config.train.steps, lr=config.optim.lr)
        return config.model_copy(update={"lr_schedule": schedule})

    @classmethod
    def model_parametrized_name(cls, params: tuple[Any, ...]) -> str:
        """The name of the class with its model and data sections put in; messages and schemas show it."""
        return cls.__name__


TransformerRun = RunConfig[TransformerModelConfig]
"""The configuration of a run whose model has attention, as planning and layouts need it."""


def has_attention(config: RunConfig) -> TypeGuard[TransformerRun]:
    """Whether the model is one that planning and the rules of layouts know: a transformer with attention."""
    return hasattr(config.model, "attention")


PlannedRun = RunConfig[PlannedModelConfig]
"""The configuration of a run whose model counts the costs of its layers, as `mt plan` needs it."""


def has_layer_costs(config: RunConfig) -> TypeGuard[PlannedRun]:
    """Whether the model counts the costs of its layers."""
    return hasattr(config.model, "layer_costs")


def sequence_lengths(data: DataSection) -> tuple[int, ...]:
    """Tokens of a sample's sequence; of an encoder's and a decoder's where it has both."""
    decoder: int | None = getattr(data, "decoder_seq_length", None)
    return (data.seq_length,) if decoder is None else (data.seq_length, decoder)
