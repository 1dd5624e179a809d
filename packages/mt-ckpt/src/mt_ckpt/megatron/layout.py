"""Where things lie: directories of iterations and ranks, and whether a model can be cut for them."""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mt_ckpt.formats import RELEASE, TRACKER
from mt_ckpt.megatron.parameters.pipeline import ENCODER_OPTION, fitting_stages, split_errors, stage_layers
from mt_core.errors import Problem
from mt_models.config import TransformerConfig

RANK_FILE = "model_optim_rng.pt"
StageRank = tuple[int, int]
"""Pipeline stage, and a rank of it: expert rank · tensor ranks + tensor rank."""


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


def rank_directory(tensor_rank: int, stage: int, stages: int, expert: int = 0, experts: int = 1) -> str:
    """mp_rank_TT, with _PPP if there is more than one pipeline stage, and _XXX if more than one expert rank."""
    numbers = [f"_{number:03d}" for number, count in ((stage, stages), (expert, experts)) if count > 1]
    return f"mp_rank_{tensor_rank:02d}" + "".join(numbers)


def rank_directories(layout: Layout) -> dict[StageRank, str]:
    """Name of the directory of every rank's files."""
    return {
        (stage, rank): rank_directory(
            rank % layout.tensor, stage, layout.pipeline, rank // layout.tensor, layout.expert
        )
        for stage in range(layout.pipeline)
        for rank in range(layout.tensor * layout.expert)
    }


def write_root_files(root: Path, tokenizer_files: Iterable[Path], iteration: int | None = None) -> None:
    """Copy the tokenizer beside what was written, and write the tracker, which says where to look."""
    for file in tokenizer_files:
        shutil.copy(file, root / file.name)
    (root / TRACKER).write_text(RELEASE if iteration is None else str(iteration))


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
    yield from _tensor_errors(config, layout, where)
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
        yield Problem(where, f"{ENCODER_OPTION} for a model that is no T5", "leave it out")
    if layers % (pipeline * virtual) and not (uneven and stage_layers(layers, pipeline, virtual)):
        problem = f"{layers} layers do not divide by {pipeline} stages of {virtual} chunks"
        fitting = ", ".join(map(str, fitting_stages(layers, virtual)))
        yield Problem(where, problem, f"stages that fit: {fitting or 'none'}" if uneven else "the same number in each")


def _tensor_errors(config: TransformerConfig, layout: Layout, where: str) -> Iterator[Problem]:
    tensor, part = layout.tensor, config.attention
    sizes = {"attention.heads": part.heads, **_list_mlp_sizes(config)}
    if part.kind == "mla" and not layout.engine:
        down = part.kv_lora_rank + part.rope_head_size
        sizes |= {"attention.kv_lora_rank + rope_head_size": down, "attention.q_lora_rank": part.q_lora_rank or 0}
    for name, size in sizes.items():
        if size % tensor:
            yield Problem(where, f"{name} = {size} does not divide by {tensor} tensor ranks", f"a divisor of {size}")
    if part.num_kv_heads % tensor and tensor % part.num_kv_heads:
        problem = f"attention.num_kv_heads = {part.num_kv_heads} and {tensor} tensor ranks"
        yield Problem(where, problem, "one must divide the other")


def _list_mlp_sizes(config: TransformerConfig) -> dict[str, int]:
    names = ("ffn_hidden_size", "shared_ffn_hidden_size", "dense_ffn_hidden_size")
    return {f"mlp.{name}": size for name in names if (size := getattr(config.mlp, name, None))}


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
