"""The base of every configuration section, and the sections that mt-core reads.

The model and data sections belong to mt-models and mt-data.
"""

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

CPCommType = Literal["ring", "all_gather", "all_to_all"]
"""How context-parallel ranks communicate; Megatron calls them p2p, all_gather and a2a."""

TokenDispatcherName = Literal["all_to_all", "all_gather"]
"""How expert-parallel ranks exchange tokens; Megatron calls them alltoall and allgather."""

ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zb-h1", "zb-2p", "zbv", "dualpipev"]
"""Pipeline schedules, by their names in `mt_core.pipeline.schedule_table`."""


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused. The docstring under a field documents it with its unit."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ParallelConfig(Section):
    """How ranks share the work. tensor × context × data × pipeline is the number of ranks."""

    data: PositiveInt | None = None
    """Ranks that take different samples; unset, what the other axes leave of the ranks that run."""
    tensor: PositiveInt = 1
    """Ranks that share each layer's matrices."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    expert: PositiveInt = 1
    """Ranks of data × context that share each layer's experts; tokens travel to the ranks of their experts."""
    expert_tensor: PositiveInt | None = None
    """Tensor ranks that share each expert's matrices: all of them, if unset too, or 1, where each has whole experts."""
    token_dispatcher: TokenDispatcherName = "all_to_all"
    """How expert ranks exchange tokens: each row goes to the rank of its expert, or every rank gets all tokens and the
    results of all are summed."""
    pipeline: PositiveInt = 1
    """Ranks that have different layers; the section `pipeline` says which, and in what order they work."""
    sequence: bool = False
    """Sequence parallelism: between the matrices, tensor ranks hold a part of the sequence each."""
    cp_comm_type: CPCommType = "ring"
    """How context ranks exchange keys and values: around a ring, gathered, or heads for positions."""
    sharding: Literal["replicate", "zero1", "fsdp"] = "replicate"
    """What data and context ranks share: nothing, the optimizer's state (ZeRO-1), or all of it (PyTorch's FSDP2)."""
    shard_size: PositiveInt | None = None
    """Ranks that share one copy of what is sharded, fewer than data × context for hybrid sharding; unset, all."""
    overlap_grad_reduce: bool = True
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = True
    """With zero1, gather the updated parameters while the next forward pass runs."""
    bucket_size: PositiveInt = 40_000_000
    """Elements of a gradient bucket, the unit of reduction."""


class PipelineConfig(Section):
    """With parallel.pipeline above 1: which layers a stage has, and in which order microbatches pass through stages."""

    schedule: ScheduleName = "1f1b"
    """Order of forward and backward passes."""
    virtual_stages: PositiveInt | None = None
    """Stages of each rank; unset, as few as the schedule takes."""
    microbatch_group_size: PositiveInt | None = None
    """With "interleaved": microbatches that pass through a stage before the rank's next; unset, parallel.pipeline."""
    num_layers_in_first_stage: PositiveInt | None = None
    """Layers of the first rank, of all its stages together; unset, as many as the others have."""
    num_layers_in_last_stage: PositiveInt | None = None
    """Layers of the last rank, likewise."""
    account_for_embedding: bool = False
    """Count the embedding as a layer of the first stage, which then has one layer fewer."""
    account_for_loss: bool = False
    """Count head and loss as a layer of the last stage, which then has one layer fewer."""
    layout: str | None = None
    """Every stage in Megatron's letters, such as "Et*3|t*4|t*4|t*3L": E embedding, t a layer, L head and loss."""
    pass_times: tuple[tuple[float, float, float], ...] | None = None
    """With "zb-2p" and "zbv": times of every stage's forward, input and weight pass in any unit, by which the order of
    passes is made where that is shorter; unset, all are equally long. `mt plan` says which."""


class RecomputeConfig(Section):
    """Activations that are recomputed in the backward pass instead of kept."""

    granularity: Literal["none", "selective", "full"] = "none"
    """Nothing; the attention core of every layer; or whole layers."""
    method: Literal["uniform", "block"] = "uniform"
    """With "full": keep the input of every group of `layers` layers, or recompute only the first `layers` layers."""
    layers: PositiveInt = 1
    """Layers of a group ("uniform"), or layers that are recomputed one by one ("block")."""


class BatchConfig(Section):
    """Sequences per step."""

    micro_batch: PositiveInt = 1
    """Sequences in one forward pass of one rank."""
    global_batch: PositiveInt = 1
    """Sequences in one optimizer step, over all ranks; a multiple of micro_batch × data-parallel ranks."""
    rampup: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    """Start, increment and samples: the batch grows by equal increments to `global_batch` over the first samples."""
    sizes: str | None = None
    """Sizes of the batch as "0:64 10M:128": where each begins, in samples (K, M, B, T); instead of `global_batch`."""


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
    nonfinite: Literal["stop", "skip"] = "stop"
    """When the gradient is infinite or not a number: end the run with the rank and parameter, or leave the step out."""
    trainable: tuple[str, ...] | None = None
    """Patterns of canonical parameter names, such as "layers.*.mlp.*"; what matches none keeps its initial value.
    Unset, all are trained, or of a model with adapters those alone."""


class TrainConfig(Section):
    """How long to train, and when to evaluate."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on the validation split; 0 for none."""
    eval_batches: PositiveInt = 10
    """Global batches in one evaluation."""


FRACTIONS = {"warmup_steps": "warmup_fraction", "min_lr": "min_lr_fraction"}
"""Fields of `lr_schedule` that may be given as a fraction → the field of the fraction, so that a preset's scale."""
SCHEDULE_UNITS = tuple((f"{name}_steps", f"{name}_samples") for name in ("warmup", "decay", "anneal"))
"""Fields of `lr_schedule` that count the same length, in steps or in samples."""
SCHEDULE_ALTERNATIVES = (*SCHEDULE_UNITS, *FRACTIONS.items(), ("warmup_samples", "warmup_fraction"))
"""Fields of `lr_schedule` that say the same: one that is given replaces the other of lower layers."""


class LRScheduleConfig(Section):
    """How the learning rate moves, from `optim.lr` down to `min_lr`."""

    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from zero."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    """In place of `warmup_steps`: the share of the steps until the decay ends; RUN/config.toml has the steps."""
    decay: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; "wsd" stays at the highest rate and anneals at the end."""
    decay_steps: PositiveInt | None = None
    """Step at which the decay ends; unset, the last of the run."""
    decay_samples: PositiveInt | None = None
    """In place of `decay_steps`: the samples after which the decay ends. The whole schedule is then counted in samples,
    so that it does not depend on how the batch grows."""
    warmup_samples: PositiveInt | None = None
    """In place of `warmup_steps`: samples of linear warm-up from zero; needs `decay_samples`."""
    min_lr: NonNegativeFloat = 0.0
    """Lowest learning rate after the warm-up."""
    min_lr_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """In place of `min_lr`: the share of `optim.lr`; RUN/config.toml has the rate."""
    anneal_steps: PositiveInt | None = None
    """Last steps of "wsd", in which the rate falls; required by it."""
    anneal_samples: PositiveInt | None = None
    """In place of `anneal_steps`: the last samples of "wsd"; needs `decay_samples`."""
    anneal: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "linear"
    """Shape of the fall of "wsd"."""

    @model_validator(mode="after")
    def _one_of_count_and_fraction(self) -> Self:
        for count, fraction in FRACTIONS.items():
            if getattr(self, fraction) is not None and count in self.model_fields_set:
                raise ValueError(f"{count} and {fraction} are both given; leave one of them out")
        return self

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        steps, samples = (
            [name for name in names if getattr(self, name)] for names in zip(*SCHEDULE_UNITS, strict=True)
        )
        if samples and steps:
            raise ValueError(f"{samples[0]} counts samples, {', '.join(steps)} steps; count all of them in samples")
        if samples and self.decay_samples is None:
            raise ValueError(f"{samples[0]} needs decay_samples, the samples after which the decay ends")
        if self.warmup_samples is not None and self.warmup_fraction is not None:
            raise ValueError("warmup_samples and warmup_fraction are both given; leave one of them out")
        return self

    @property
    def unit(self) -> Literal["steps", "samples"]:
        """What the schedule counts."""
        return "steps" if self.decay_samples is None else "samples"

    @property
    def warmup(self) -> int:
        """Length of the warm-up, in its unit."""
        return self.warmup_samples or self.warmup_steps

    @property
    def anneal_length(self) -> int | None:
        """Length of the fall of "wsd", in its unit."""
        return self.anneal_samples or self.anneal_steps

    def get_end(self, steps: int) -> int:
        """Where the decay of a run of so many steps ends, in its unit."""
        return self.decay_samples or self.decay_steps or steps

    def resolve_fractions(self, *, steps: int, lr: float) -> Self:
        """Counts and rates in place of fractions, for a run of so many steps with this highest learning rate."""
        end = self.get_end(steps)
        resolved: dict[str, float | None] = {}
        if self.warmup_fraction is not None:
            warmup = min(round(self.warmup_fraction * end), end - 1)
            key, value = ("warmup_samples", warmup or None) if self.decay_samples else ("warmup_steps", warmup)
            resolved |= {key: value, "warmup_fraction": None}
        if self.min_lr_fraction is not None:
            resolved |= {"min_lr": float(f"{self.min_lr_fraction * lr:.12g}"), "min_lr_fraction": None}
        return self.model_copy(update=resolved)


class PrecisionConfig(Section):
    """Arithmetic."""

    dtype: Literal["bf16", "fp16", "fp32", "fp64"] = "fp32"
    """Data type of parameters and activations. With bf16 and fp16, weights are updated in fp32."""
    gradients: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """In which gradients are added up and reduced; "auto" is fp16 for fp16, fp64 for fp64, else fp32."""
    loss_scale: PositiveFloat | None = None
    """A fixed loss scale for fp16; unset, it follows the gradients."""
    initial_loss_scale: PositiveFloat = 2.0**32
    """First value of the scale that follows the gradients."""
    min_loss_scale: PositiveFloat = 1.0
    """Lowest value of the scale that follows the gradients."""
    loss_scale_window: PositiveInt = 1000
    """Finite steps in a row after which the scale doubles."""
    hysteresis: PositiveInt = 2
    """Steps that overflow before it is halved."""


class CheckpointConfig(Section):
    """When to save and what to start from."""

    every: NonNegativeInt = 0
    """Steps between checkpoints; one is always saved on SIGTERM."""
    at_end: bool = True
    """Save the last step."""
    keep: PositiveInt | None = None
    """Newest checkpoints to keep; unset, all."""
    save_format: Literal["native", "hf"] = "native"
    """With "hf", the last step is also written in Hugging Face format, to RUN/hf, when the run is done."""
    async_save: bool = False
    """Write checkpoints while training goes on; at most one at a time."""
    init: str | None = None
    """Weights to start from, as LOADER:PATH, for example "hf:DIR"; unset, random."""
    init_options: dict[str, str | int] = {}
    """Options of that loader, for example { megatron_args = "args.json" }."""
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
    """Compile blocks, the loss and the adding up of gradients with torch.compile."""
    weight_gradients: Literal["auto", "separate", "fused"] = "auto"
    """Add gradients of matrices to their sums inside the matrix products ("fused") or after them; "auto" takes what a
    first try shows to be faster on a GPU, and adds after them on a CPU or if `deterministic`."""
    deterministic: bool = False
    """Two runs give identical losses and checkpoints; what cannot is refused by name."""
    stall_timeout: PositiveFloat = 600.0
    """Seconds without progress after which a rank reports where it is and ends."""
    threads: PositiveInt | None = None
    """CPU threads of each rank; unset, OMP_NUM_THREADS, else the cores divided by the ranks on this machine."""
