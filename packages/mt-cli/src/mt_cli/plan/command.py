"""`mt plan`: what a run would need and take on N GPUs, before there are any."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mt_cli.options import Files, Overrides, Preset
from mt_core.config.run_config import PlannedRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mt_core.planning.gpu_profile import Profile
    from mt_core.planning.plan import Plan

EXIT_DOES_NOT_FIT = 1


def plan(
    gpus: Annotated[int, typer.Option(min=1, help="GPUs to plan for: tensor × context × data × pipeline.")],
    files: Files = None,
    overrides: Overrides = None,
    preset: Preset = None,
    profile: Annotated[
        str, typer.Option(help="Kind of GPU: a name, or a FILE.toml of measured rates.")
    ] = "nvidia-h200",
    memory_gib: Annotated[
        float | None, typer.Option(min=0.1, help="Memory of one GPU, instead of the profile's.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write memory.svg and timeline.svg into this directory.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="Order of a pipeline's passes, as --set pipeline.schedule=NAME.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw when each rank of a pipeline does which pass, into this SVG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="List every item and all assumptions.")] = False,
) -> None:
    """Predict memory, communication and step time of a run on GPUs that need not be there.

    Exit code 1: it does not fit.

    Example:
      mt plan --preset llama3-8b --gpus 8 --set parallel.tensor=4 --set batch.global_batch=16
    """
    from mt_cli.run_config import load_run_config
    from mt_core.config.run_config import has_layer_costs
    from mt_core.errors import MtError
    from mt_core.planning.gpu_profile import read_profile
    from mt_core.planning.memory import GIB

    changed = [*(overrides or []), *([f"pipeline.schedule={schedule}"] if schedule else [])]
    config = load_run_config(files or [], changed, preset, rules=False)  # planning needs no data
    if not has_layer_costs(config):
        raise MtError("model.kind", f"{config.model.kind!r}: the arithmetic of this model is not known", "allowed: gpt")
    kind = read_profile(profile)
    if memory_gib is not None:
        kind = kind.model_copy(update={"memory_gib": memory_gib})
    if config.parallel.pipeline > 1:
        if svg is not None:
            raise MtError("--svg", "draws ranks that are alike, which those of a pipeline are not", "use --picture")
        made, printed = _plan_pipeline(config, gpus, kind, picture, as_json=as_json, explain=explain)
    else:
        if picture is not None:
            raise MtError("--picture", "draws a pipeline, and parallel.pipeline is 1", "use --svg, or set it above 1")
        made, printed = _plan_layout(config, gpus, kind, svg, as_json=as_json, explain=explain)
    print(printed)
    if not made.fits:
        needed, present = made.total / GIB, made.capacity / GIB
        on = "each GPU" if config.parallel.pipeline == 1 else "a GPU"
        print(f"mt: does not fit: {needed:.1f} GiB of {present:.1f} on {on}", file=sys.stderr)
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _plan_layout(
    run: PlannedRun, gpus: int, kind: "Profile", svg: Path | None, *, as_json: bool, explain: bool
) -> "tuple[Plan, str]":
    """The plan of a run whose ranks are all alike, and its report; its pictures are written."""
    from mt_cli.plan.report import as_values, lines
    from mt_core.planning.plan import plan as make_plan
    from mt_core.planning.suggestions import find_fitting_layouts, find_fitting_ranks

    config = _at_full_batch(run)
    made = make_plan(config, gpus, kind)
    _check_batches(run, made.layout.dims.data)
    advice = [] if made.fits else find_fitting_layouts(config, made.layout, kind, ranks=gpus)
    more = None if made.fits or advice else find_fitting_ranks(config, made.layout, kind)
    if svg is not None:
        _draw(svg, made, f"{gpus} × {kind.name}")
    if as_json:
        return made, json.dumps(as_values(config, made, kind, advice, more), indent=2)
    return made, "\n".join(lines(config, made, kind, advice, more, explain=explain))


def _plan_pipeline(
    run: PlannedRun, gpus: int, kind: "Profile", picture: Path | None, *, as_json: bool, explain: bool
) -> "tuple[Plan, str]":
    """The plan of the fullest rank of a pipeline, and the report of all; its picture is written."""
    from mt_cli.plan.pipeline_report import Faster, get_values, list_lines
    from mt_core.files import atomic_file, disk_errors
    from mt_core.planning.pipeline.pipeline_plan import check_pipeline, plan_pipeline
    from mt_core.planning.pipeline.schedule_comparison import (
        balance_candidate,
        compare_schedules,
        order_candidate,
        recommend_schedule,
    )
    from mt_core.planning.pipeline.schedule_svg import draw_schedule

    config = _at_full_batch(run)
    layout = check_pipeline(config, gpus)
    made = plan_pipeline(config, layout, kind)
    counts = [size // (layout.micro_batch * layout.dims.data) for size in _check_batches(run, layout.dims.data)]
    candidates = compare_schedules(config, layout, kind, counts)
    recommended = recommend_schedule(candidates)
    balanced = balance_candidate(config, layout, kind, recommended.candidate) if recommended else None
    ordered = order_candidate(config, layout, kind, balanced or recommended.candidate) if recommended else None
    faster = Faster(balanced, ordered)
    if picture is not None:
        with disk_errors(picture.parent):
            picture.parent.mkdir(parents=True, exist_ok=True)
        title = f"{made.schedule.name} on {gpus} × {kind.name}, {made.schedule.microbatches} microbatches"
        with atomic_file(picture, "w") as file:
            file.write(draw_schedule(made.timeline, title, unit="ms", factor=1e3))
    if as_json:
        printed = json.dumps(get_values(config, made, kind, candidates, recommended, faster), indent=2)
    else:
        printed = "\n".join(list_lines(config, made, kind, candidates, recommended, faster, explain=explain))
    return made.plans[made.fullest], printed


def _check_batches(config: PlannedRun, data: int) -> "Sequence[int]":
    """Every size of the batch over the run; `MtError` if so many data ranks, or the schedule, do not take one."""
    from mt_cli.rules import list_batch_problems
    from mt_core.errors import raise_if
    from mt_data.batching.batch_sizes import make_batch_sizes

    parallel = config.parallel.model_copy(update={"data": data})
    raise_if(list_batch_problems(config.model_copy(update={"parallel": parallel})))
    return make_batch_sizes(config.batch).sizes()


def _at_full_batch(config: PlannedRun) -> PlannedRun:
    """A batch that grows, at its largest."""
    from mt_data.batching.batch_sizes import parse_steps

    if not config.batch.sizes:
        return config
    full = {"global_batch": parse_steps(config.batch.sizes).sizes()[-1], "sizes": None}
    return config.model_copy(update={"batch": config.batch.model_copy(update=full)})


def _draw(folder: Path, made: Any, title: str) -> None:
    from mt_core.files import atomic_file, disk_errors
    from mt_core.planning.svg import draw_memory, draw_timeline

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("memory.svg", draw_memory), ("timeline.svg", draw_timeline)):
        with atomic_file(folder / name, "w") as file:
            file.write(draw(made, title))
