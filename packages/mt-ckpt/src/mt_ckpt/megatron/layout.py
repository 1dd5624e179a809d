"""Where things lie: directories of iterations and ranks, and whether a model can be cut for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mt_ckpt.megatron.parameters.pipeline import fitting_stages, stage_layers
from mt_ckpt.megatron.parameters.t5_pipeline import OPTION, split_errors
from mt_core.errors import MtError, Problem
from mt_models.config import TransformerConfig

TRACKER, RANK_FILE, RELEASE = "latest_checkpointed_iteration.txt", "model_optim_rng.pt", "release"


@dataclass(frozen=True)
class Layout:
    """How a model is cut into files."""

    tensor: int
    pipeline: int
    virtual: int
    """Chunks of each pipeline stage."""
    engine: bool
    """Whether tensors bear Transformer Engine's names."""
    expert: int = 1
    """Ranks that share the experts of a layer."""
    grouped: bool = False
    """Whether experts bear TEGroupedMLP's names, in `torch` files."""
    encoder: int = 0
    """The pipeline's first stages, which hold a T5's encoder and not its decoder; 0 if a stage holds both."""


def iteration_directory(path: Path) -> Path:
    """The directory of one iteration, for itself or for the root with its tracker (docs/specs/checkpoints.md §1.1)."""
    if not path.is_dir():
        raise MtError(str(path), "no such directory", f"give one that holds {TRACKER}")
    tracker = path / TRACKER
    if not tracker.is_file():
        if any(path.glob("mp_rank_*")) or (path / ".metadata").is_file():
            return path
        raise MtError(str(path), f"holds no {TRACKER}", "give a checkpoint of Megatron, or one of its iterations")
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise MtError(str(tracker), f"says {text[:40]!r}", f"an iteration or {RELEASE!r}")
    directory = path / iteration_name(None if text == RELEASE else int(text))
    if not directory.is_dir():
        raise MtError(str(directory), "missing", f"{TRACKER} names it: copy it, or correct the tracker")
    return directory


def iteration_name(iteration: int | None) -> str:
    """The directory of an iteration, and of a model that is none of a run's: iter_0000007, or release."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def rank_directory(tensor_rank: int, stage: int, stages: int, expert: int = 0, experts: int = 1) -> str:
    """mp_rank_TT, with _PPP if there is more than one pipeline stage, and _XXX if more than one expert rank."""
    numbers = [f"_{number:03d}" for number, count in ((stage, stages), (expert, experts)) if count > 1]
    return f"mp_rank_{tensor_rank:02d}" + "".join(numbers)


def rank_file(directory: Path, tensor_rank: int, stage: int, stages: int, expert: int = 0, experts: int = 1) -> Path:
    """The file of a rank; before 2023, beside a distributed optimizer, it was called model_rng.pt."""
    rank = rank_directory(tensor_rank, stage, stages, expert, experts)
    old = (directory / name / "model_rng.pt" for name in (rank, f"{rank}_000"))
    return next((file for file in old if file.is_file()), directory / rank / RANK_FILE)


def layout_errors(
    config: TransformerConfig, layout: Layout, where: str = "saver core", *, uneven: bool = False
) -> Iterator[Problem]:
    """Why a model cannot be cut so; with `uneven`, the first and the last stage may have other numbers of layers."""
    tensor, pipeline, virtual, expert = layout.tensor, layout.pipeline, layout.virtual, layout.expert
    sizes = {"tensor": tensor, "pipeline": pipeline, "virtual-pipeline": virtual, "expert": expert}
    bad = [f"--target-{name}-parallel-size" for name, size in sizes.items() if size < 1]
    yield from (Problem(where, f"{name} is below 1", "a positive number") for name in bad)
    if bad:
        return
    yield from _tensor_errors(config, tensor, where)
    yield from _expert_errors(config, expert, where)
    yield from _grouped_errors(config, layout)
    if config.kind == "t5":
        yield from split_errors(config, pipeline, layout.encoder, where)
    else:
        yield from _stage_errors(config, layout, where, uneven=uneven)
    if virtual > 1 and config.kind == "t5":
        problem = f"{virtual} virtual stages of a T5"
        yield Problem(where, problem, "Megatron interleaves no encoder and decoder: 1")
    elif virtual > 1 and pipeline == 1:
        yield Problem(where, "virtual stages without pipeline stages", "--target-pipeline-parallel-size of 2 or more")


def _stage_errors(config: TransformerConfig, layout: Layout, where: str, *, uneven: bool) -> Iterator[Problem]:
    layers, pipeline, virtual = config.layers, layout.pipeline, layout.virtual
    if layout.encoder:
        yield Problem(where, f"{OPTION} for a model that is no T5", "leave it out")
    if layers % (pipeline * virtual) and not (uneven and stage_layers(layers, pipeline, virtual)):
        problem = f"{layers} layers do not divide by {pipeline} stages of {virtual} chunks"
        fitting = ", ".join(map(str, fitting_stages(layers, virtual)))
        yield Problem(where, problem, f"stages that fit: {fitting or 'none'}" if uneven else "the same number in each")


def _tensor_errors(config: TransformerConfig, tensor: int, where: str) -> Iterator[Problem]:
    part = config.attention
    for name, size in (("attention.heads", part.heads), ("mlp.ffn_hidden_size", config.mlp.ffn_hidden_size)):
        if size % tensor:
            yield Problem(where, f"{name} = {size} does not divide by {tensor} tensor ranks", f"a divisor of {size}")
    if part.num_kv_heads % tensor and tensor % part.num_kv_heads:
        problem = f"attention.num_kv_heads = {part.num_kv_heads} and {tensor} tensor ranks"
        yield Problem(where, problem, "one must divide the other")


def _expert_errors(config: TransformerConfig, expert: int, where: str) -> Iterator[Problem]:
    if expert > 1 and config.mlp.kind != "moe":
        allowed = "leave --target-expert-parallel-size out"
        yield Problem(where, f"{expert} expert ranks for a model without experts", allowed)
    elif config.mlp.kind == "moe" and config.mlp.experts % expert:
        problem = f"mlp.experts = {config.mlp.experts} does not divide by {expert} expert ranks"
        yield Problem(where, problem, f"a divisor of {config.mlp.experts}")


def _grouped_errors(config: TransformerConfig, layout: Layout) -> Iterator[Problem]:
    if layout.grouped and config.mlp.kind != "moe":
        yield Problem("--moe-grouped-gemm", "the model has no experts", "leave it out")
    elif layout.grouped and not layout.engine:
        problem = "Megatron's own grouped experts are gone from its newest releases"
        yield Problem("--moe-grouped-gemm", problem, "--saver-transformer-impl transformer_engine")
