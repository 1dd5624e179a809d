"""From one format to another; the result appears when all of it is written, and proven if that was asked for."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mt_ckpt.formats import RELEASE, iteration_directory, iteration_name
from mt_ckpt.megatron.args.model_types import model_problems
from mt_ckpt.megatron.args.t5 import NORM_NOTES
from mt_ckpt.megatron.layout import Layout, layout_errors, write_root_files
from mt_ckpt.megatron.optimizer import KINDS
from mt_ckpt.megatron.optimizer.distrib_optim import depends_on_buckets
from mt_ckpt.megatron.optimizer.param_groups import list_stages_without_experts
from mt_ckpt.megatron.parameters.pipeline import declared_stages
from mt_ckpt.megatron.placement import place_parameters
from mt_ckpt.megatron.training_state.common_state import layout_from_args
from mt_ckpt.megatron.training_state.read_native import read_native
from mt_ckpt.megatron.training_state.read_torch import read_torch
from mt_ckpt.megatron.training_state.read_torch_dist import read_torch_dist
from mt_ckpt.megatron.training_state.state import TrainingState
from mt_ckpt.megatron.training_state.write_native import write_native
from mt_ckpt.megatron.training_state.write_torch import write_torch
from mt_ckpt.megatron.training_state.write_torch_dist import MCORE_0_11, PLAIN, RESHARDABLE, write_torch_dist
from mt_ckpt.tensor_streams.safetensors_directory import read_json
from mt_ckpt.tensor_streams.streams import align_streams, bitwise_equal
from mt_core.checkpoint.detection import detect_loader
from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_directory
from mt_models.config import TransformerConfig

WHERE = "convert-format"
FORMATS = ("torch", "torch_dist", "native")
DISTRIBUTED = "distributed"
OPTIMIZERS = {"torch": (DISTRIBUTED, PLAIN), "torch_dist": (DISTRIBUTED, MCORE_0_11, PLAIN), "native": (DISTRIBUTED,)}
"""How the optimizer may be stored; "distributed" is what the newest release of Megatron takes."""


class MegatronReader(Protocol):
    """Reads one iteration of a format of Megatron's."""

    def __call__(
        self,
        directory: Path,
        tensor: int | None = None,
        true_vocab_size: int | None = None,
        given: Mapping[str, Any] = ...,
    ) -> TrainingState:
        """The state; for a target of Megatron's with `tensor` ranks, padding is kept."""
        ...


READERS: Mapping[str, MegatronReader] = {"torch": read_torch, "torch_dist": read_torch_dist}


@dataclass(frozen=True)
class Target:
    """What to write. Sizes that are not given are the source's."""

    format: str
    tensor: int | None = None
    pipeline: int | None = None
    virtual: int | None = None
    expert: int | None = None
    implementation: str | None = None
    """Whose names the files bear: transformer_engine or local."""
    grouped: bool | None = None
    """Whether experts bear TEGroupedMLP's names, in `torch` files."""
    optimizer: str = DISTRIBUTED


@dataclass(frozen=True)
class ConversionResult:
    """What a conversion did."""

    path: Path
    source_format: str
    state: TrainingState
    lost: tuple[str, ...]
    """What was found and not carried, in words."""
    hints: tuple[str, ...]
    """What to do to go on from the result."""
    proven: bool


def convert_format(
    load_dir: Path,
    save_dir: Path,
    target: Target,
    *,
    true_vocab_size: int | None = None,
    megatron_args: Path | None = None,
    verify: bool = False,
) -> ConversionResult:
    """Convert a training state; with `verify`, every tensor is read back and compared, bit by bit."""
    raise_if(_wrong(target))
    form = detect_format(load_dir)
    if form == target.format == "native":
        raise MtError(str(load_dir), "is in native format already", f"--to {' or '.join(FORMATS[:2])}")
    if megatron_args and form == "native":
        raise MtError("--megatron-args", "given for a native checkpoint", "it has no such arguments: leave it out")
    given = read_json(megatron_args) if megatron_args else {}
    state, layout = _open(load_dir, form, target, (true_vocab_size, given))
    lost = list(state.lost)
    with atomic_directory(save_dir) as staging:
        if target.format == "native":
            lost += write_native(staging, state)
        else:
            lost += _write_megatron(staging, state, layout, target)
        if verify:
            verify_result(staging, target.format, state)
    return ConversionResult(save_dir, form, state, tuple(lost), tuple(_hints(target, state, layout, save_dir)), verify)


def _wrong(target: Target) -> Iterator[Problem]:
    if target.format not in FORMATS:
        yield Problem("--to", f"unknown format {target.format!r}", f"allowed: {', '.join(FORMATS)}")
    elif target.optimizer not in OPTIMIZERS[target.format]:
        allowed = f"with --to {target.format}: {', '.join(OPTIMIZERS[target.format])}"
        yield Problem("--target-optimizer", f"no {target.optimizer!r}", allowed)
    if target.implementation not in (None, "transformer_engine", "local"):
        problem = f"unknown name {target.implementation!r}"
        yield Problem("--saver-transformer-impl", problem, "allowed: transformer_engine, local")
    sizes = (target.tensor, target.pipeline, target.virtual, target.expert, target.implementation, target.grouped)
    if target.format == "native" and any(size is not None for size in sizes):
        yield Problem("--target-…", "given with --to native", "native checkpoints know no layout: leave it out")


def detect_format(path: Path) -> str:
    """The format of a checkpoint."""
    loader = detect_loader(path)
    if loader == "native":
        return loader
    if loader != "core":
        raise MtError(str(path), f"is in {loader} format", f"training states are in {', '.join(FORMATS)}")
    directory = iteration_directory(path)
    if directory.name == RELEASE:
        raise MtError(str(directory), "is a release, which holds a model alone", "use mt ckpt convert")
    return "torch_dist" if (directory / ".metadata").is_file() else "torch"


def _open(
    path: Path, form: str, target: Target, options: tuple[int | None, Mapping[str, Any]]
) -> tuple[TrainingState, Layout]:
    """The state and the layout to write; `options` are the true vocabulary and Megatron's arguments."""
    if form == "native":
        state = read_native(path)
        layout = _layout(target, Layout(1, 1, 1, engine=True))
    else:
        directory = iteration_directory(path)
        read = READERS[form]
        plain = read(directory, None, *options)
        raise_if(_staged_t5(plain.config, declared_stages(Namespace(**plain.args))[0]))
        layout = _layout(target, layout_from_args(plain.args))
        state = plain if target.format == "native" else read(directory, layout.tensor, *options)
    if target.format != "native":
        raise_if(model_problems(state.config, WHERE))
        raise_if(_staged_t5(state.config, layout.pipeline))
        raise_if(layout_errors(state.config, layout, WHERE, uneven=True))
        raise_if(list_stages_without_experts(state.config, layout, WHERE))
    return state, layout


def _staged_t5(config: TransformerConfig, stages: int) -> Iterator[Problem]:
    if config.kind == "t5" and stages > 1:
        allowed = "one stage; or mt ckpt convert, which moves its weights alone"
        yield Problem(WHERE, f"the optimizer of a T5 on {stages} pipeline stages", allowed)


def _layout(target: Target, source: Layout) -> Layout:
    given = {"tensor": target.tensor, "pipeline": target.pipeline, "virtual": target.virtual, "expert": target.expert}
    changed: dict[str, Any] = {name: size for name, size in given.items() if size is not None}
    if target.implementation:
        changed["engine"] = target.implementation == "transformer_engine"
        changed["grouped"] = source.grouped and changed["engine"]
    if target.grouped is not None:
        changed["grouped"] = target.grouped
    return replace(source, **changed)


def _write_megatron(staging: Path, state: TrainingState, layout: Layout, target: Target) -> list[str]:
    directory = staging / iteration_name(state.iteration)
    if target.format == "torch":
        write_torch(directory, state, layout, distributed=target.optimizer == DISTRIBUTED)
    else:
        stored = RESHARDABLE if target.optimizer == DISTRIBUTED else target.optimizer
        write_torch_dist(directory, state, layout, optimizer=stored)
    write_root_files(staging, state.tokenizer_files, state.iteration)
    random = state.random
    if random and (random.tensor, random.pipeline) != (layout.tensor, layout.pipeline):
        sizes = f"{random.tensor} tensor ranks and {random.pipeline} stages"
        return [f"the state of random generators, which is that of {sizes}"]
    return []


def verify_result(staging: Path, form: str, state: TrainingState) -> None:
    """Read the result back and compare every tensor and count."""
    if form == "native":
        back = read_native(staging)
    else:
        back = READERS[form](iteration_directory(staging), None, state.config.vocab_size)
    wrong = [
        name for name in ("iteration", "samples", "optimizer_steps") if getattr(back, name) != getattr(state, name)
    ]
    for kind in ("model", *KINDS):
        streams = [{"model": source.weights, **source.optimizer}[kind]() for source in (state, back)]
        wrong += [f"{kind} {name}" for name, pair in align_streams(streams) if not _same(*pair)]
    raise_if(
        Problem(f"{WHERE}: {name}", "is not read back as it was", "the result was removed; please report this")
        for name in wrong
    )


def _same(tensor: Tensor | None, other: Tensor | None) -> bool:
    return tensor is not None and other is not None and bitwise_equal(tensor, other)


def _hints(target: Target, state: TrainingState, layout: Layout, path: Path) -> Iterator[str]:
    if target.format == "native":
        yield f"mt train {path}/settings.toml RUN.toml --set runtime.run_dir={path}  (RUN.toml: your data)"
        return
    if state.config.kind == "t5":
        yield NORM_NOTES[state.config.final_norm]
    random = state.random
    if not random or (random.tensor, random.pipeline) != (layout.tensor, layout.pipeline):
        yield "start Megatron with --no-load-rng"
    if (
        target.format == "torch"
        and target.optimizer == DISTRIBUTED
        and depends_on_buckets(place_parameters(state.config, layout))
    ):
        yield "start Megatron without --overlap-grad-reduce, whose buckets would lay the optimizer out differently"
