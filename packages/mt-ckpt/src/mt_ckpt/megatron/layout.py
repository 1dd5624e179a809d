"""Where things lie: directories of ranks, and which stage holds which layers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import MtError, Problem
from mt_models.config import GPTConfig

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


def iteration_directory(path: Path) -> Path:
    """The directory of one iteration, for itself or for the root with its tracker (§1.1)."""
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
    found = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise MtError(str(found), "missing", f"{TRACKER} names it: copy it, or correct the tracker")
    return found


def rank_directory(tensor_rank: int, stage: int, stages: int) -> str:
    """mp_rank_TT, and _PPP if there is more than one pipeline stage."""
    return f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def layer_places(layers: int, layout: Layout) -> list[tuple[int, int, int]]:
    """Stage, chunk and local number of each layer, evenly cut; chunks of a stage are apart (§3.10)."""
    each = layers // (layout.pipeline * layout.virtual)
    return [(n // each % layout.pipeline, n // each // layout.pipeline, n % each) for n in range(layers)]


def misfits(config: GPTConfig, layout: Layout) -> Iterator[Problem]:
    """Why a model cannot be cut so."""
    where, part, tensor = "saver core", config.attention, layout.tensor
    sizes = {"tensor": tensor, "pipeline": layout.pipeline, "virtual-pipeline": layout.virtual}
    bad = [f"--target-{name}-parallel-size" for name, size in sizes.items() if size < 1]
    yield from (Problem(where, f"{name} is below 1", "a positive number") for name in bad)
    if bad:
        return
    for name, size in (("attention.heads", part.heads), ("mlp.size", config.mlp.size)):
        if size % tensor:
            yield Problem(where, f"{name} = {size} does not divide by {tensor} tensor ranks", f"a divisor of {size}")
    if part.kv_groups % tensor and tensor % part.kv_groups:
        found = f"attention.kv_groups = {part.kv_groups} and {tensor} tensor ranks"
        yield Problem(where, found, "one must divide the other")
    if config.layers % (layout.pipeline * layout.virtual):
        found = f"{config.layers} layers do not divide by {layout.pipeline} stages of {layout.virtual} chunks"
        yield Problem(where, found, "the same number of layers in each")
    if layout.virtual > 1 and layout.pipeline == 1:
        yield Problem(where, "virtual stages without pipeline stages", "--target-pipeline-parallel-size of 2 or more")
