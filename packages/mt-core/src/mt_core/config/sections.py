"""The sections that mt-core reads. The model and data sections belong to mt-models and mt-data."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mt_core.config.section import Section


class ParallelConfig(Section):
    """How many ranks share the work along each axis."""

    data: PositiveInt | None = None
    """Replicas of the model; unset, every rank that the launcher started is one."""


class BatchConfig(Section):
    """Sequences per step."""

    micro_batch: PositiveInt = 1
    """Sequences in one forward pass of one rank."""
    global_batch: PositiveInt = 1
    """Sequences in one optimizer step, over all ranks; a multiple of micro_batch × data-parallel ranks."""


class OptimConfig(Section):
    """The optimizer."""

    name: str = "adamw"
    """A component of kind `optimizer`."""
    lr: PositiveFloat = 3e-4
    """Highest learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the gradient's running mean."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the squared gradient's running mean."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of matrices; biases and one-dimensional parameters have none."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""


class ScheduleConfig(Section):
    """How long to train, how the learning rate moves, and when to evaluate."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    decay: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; "wsd" stays at the highest rate and anneals at the end."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; unset, the last."""
    min_lr: NonNegativeFloat = 0.0
    """Lowest learning rate after the warm-up."""
    anneal_steps: PositiveInt | None = None
    """Last steps of "wsd", in which the rate falls; required by it."""
    anneal: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of the fall of "wsd"."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_batches: PositiveInt = 10
    """Global batches in one evaluation."""


class PrecisionConfig(Section):
    """Arithmetic."""

    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"
    """Of parameters and activations. With bf16, gradients are accumulated and weights updated in fp32."""


class CheckpointConfig(Section):
    """When to save and what to start from."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; one is always saved at the end and on SIGTERM."""
    keep: PositiveInt | None = None
    """Newest checkpoints to keep; unset, all."""
    init: str | None = None
    """Weights to start from, as LOADER:PATH, for example "hf:DIR"; unset, random."""
    resume: bool = True
    """Go on from the run directory's latest checkpoint; false refuses a run directory that has one."""


class LogConfig(Section):
    """What is reported."""

    every: PositiveInt = 10
    """Steps between log lines; metrics.jsonl gets every one of them."""
    sinks: tuple[str, ...] = ()
    """Further receivers of metrics, from plugins, for example "tensorboard"."""


class RuntimeConfig(Section):
    """Where and how the run executes."""

    run_dir: str = "run"
    """Directory for checkpoints, metrics.jsonl, config.toml and the index cache."""
    seed: NonNegativeInt = 1234
    """Seed of weights and data order."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """With "auto", a GPU if there is one."""
    compile: bool = False
    """Compile each block with torch.compile."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; unset, the cores divided by the ranks on this machine."""
