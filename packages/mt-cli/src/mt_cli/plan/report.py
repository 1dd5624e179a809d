"""What `mt plan` prints: tables for people, plain values for machines."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from mt_core.config.run_config import TransformerRun
from mt_core.parallel.nearest_layouts import describe
from mt_core.planning.communication import Transfer
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.memory import GIB, by_category
from mt_core.planning.plan import ASSUMPTIONS, Plan
from mt_core.planning.suggestions import Suggestion

More = tuple[int, Suggestion] | None
"""A larger number of GPUs on which something fits, and what."""


def lines(
    config: TransformerRun, plan: Plan, profile: Profile, advice: Sequence[Suggestion], more: More, *, explain: bool
) -> Iterator[str]:  # fmt: skip
    """The whole report."""
    yield from describe_head(config, plan, profile)
    yield from describe_memory(plan, explain=explain)
    if not plan.fits:
        yield from _advice(plan, advice, more)
    yield from describe_communication(plan, profile)
    yield from describe_step(config, plan, profile, plan.layout.dims.ranks)
    if explain:
        yield from describe_explanation(profile)
    else:
        yield from ["", "--explain lists every item and all assumptions"]


def describe_head(config: TransformerRun, plan: Plan, profile: Profile) -> Iterator[str]:
    """The model, its layout and its batch."""
    layout, dims, stages = plan.layout, plan.layout.dims, config.parallel.pipeline
    parameters = sum(map(prod, config.model.canonical_shapes().values()))
    yield f"model      {parameters:,} parameters, {config.model.layers} layers, {config.precision.dtype}"
    axes = describe(layout) + (f" × pipeline {stages}" if stages > 1 else "")
    yield f"layout     {axes} = {dims.ranks * stages} {profile.name}; {_sharding(plan)}; {_recompute(plan)}"
    batch, length = config.batch.global_batch, config.data.seq_length
    ranks = f"{dims.data} data rank{'s' if dims.data > 1 else ''}"
    yield f"batch      {batch} × {length:,} tokens = {plan.micro_batches} × {layout.micro_batch} on {ranks}"
    if growth := get_growth(config):
        least = growth["start"] // (layout.micro_batch * dims.data)
        yield (
            f"           grown from {growth['start']} = {least} × {layout.micro_batch} by {growth['increment']} "
            f"over {growth['samples']:,} samples, {growth['steps']:,} steps"
        )


def get_growth(config: TransformerRun) -> dict[str, int] | None:
    """How the batch grows at the begin of the run, and in how many steps."""
    from mt_data.batching.batch_sizes import make_batch_sizes

    if config.batch.rampup is None:
        return None
    sizes, consumed, steps = make_batch_sizes(config.batch), 0, 0
    while (size := sizes.size_after(consumed)) < config.batch.global_batch:
        consumed, steps = consumed + size, steps + 1
    start, increment, samples = config.batch.rampup
    return {"start": start, "increment": increment, "samples": samples, "steps": steps}


def _sharding(plan: Plan) -> str:
    layout = plan.layout
    if layout.sharding == "replicate":
        return "replicate"
    return f"{layout.sharding} over {layout.shard_group_size}" + (
        f", {layout.replicas} copies" if layout.replicas > 1 else ""
    )


def _recompute(plan: Plan) -> str:
    recompute = plan.layout.recompute
    text = f"{recompute.granularity} recompute" if recompute.granularity != "none" else "no recompute"
    return f"{text}, {recompute.method} {recompute.layers}" if recompute.granularity == "full" else text


def describe_memory(plan: Plan, *, explain: bool, whose: str = "one GPU") -> Iterator[str]:
    """The memory of a GPU by category, and whether it is there."""
    yield f"\n{f'memory of {whose}':<36}{'GiB':>10}"
    for category, size in by_category(plan.items).items():
        yield f"  {category:<34}{size / GIB:>10.2f}"
        if explain:
            yield from (
                f"    {item.what:<32}{item.size / GIB:>10.2f}" for item in plan.items if item.category == category
            )
    left = (plan.capacity - plan.total) / GIB
    verdict = f"fits, {left:.1f} left" if plan.fits else f"does not fit, {-left:.1f} too much"
    yield f"  {'total':<34}{plan.total / GIB:>10.2f} of {plan.capacity / GIB:.1f}: {verdict}"


def _advice(plan: Plan, advice: Sequence[Suggestion], more: More) -> Iterator[str]:
    ranks = plan.layout.dims.ranks
    layouts, heading = list(advice), f"what fits on {ranks}"
    if not layouts and more:
        layouts, heading = [more[1]], f"nothing near it fits; but on {more[0]}"
    if not layouts:
        yield f"\nnothing near it fits, on {ranks} or many times as many GPUs"
        return
    yield f"\n{heading:<36}{'GiB':>10}{'ms a step':>12}"
    for suggestion in layouts:
        words = " ".join(f"--set {change}" for group in suggestion.changes for change in group)
        yield f"{'':<36}{suggestion.plan.total / GIB:>10.2f}{suggestion.plan.step.seconds * 1e3:>12,.1f}  {words}"


def _times(plan: Plan, transfer: Transfer) -> int:
    """How often a step does it."""
    return plan.micro_batches if transfer.phase in ("forward", "backward") else 1


def describe_communication(plan: Plan, profile: Profile, *, whose: str = "one GPU") -> Iterator[str]:
    """Every collective of a step."""
    if not plan.transfers:
        yield "\nno communication"
        return
    yield f"\n{f'communication of {whose} in a step':<36}{'calls':>7}{'MB each':>9}{'GB sent':>10}{'ms':>9}  of"
    for transfer in plan.transfers:
        times = _times(plan, transfer)
        name = f"{transfer.axis} {transfer.collective}"
        numbers = f"{transfer.calls * times:>7.0f}{transfer.size / 1e6:>9.1f}{transfer.sent * times / 1e9:>10.2f}"
        beside = f" (beside {transfer.hidden})" if transfer.hidden else ""
        yield f"  {name:<34}{numbers}{transfer.seconds(profile) * times * 1e3:>9.1f}  {transfer.what}{beside}"


def describe_step(
    config: TransformerRun, plan: Plan, profile: Profile, gpus: int, *, whose: str = ""
) -> Iterator[str]:  # fmt: skip
    """The time of a step by what it goes to, and the speed of a run on so many GPUs."""
    seconds = plan.step.seconds
    yield f"\n{f'step{whose}':<36}{'ms':>10}{'%':>8}"
    for name, part in plan.step.parts.items():
        yield f"  {name:<34}{part * 1e3:>10.1f}{part / seconds * 100:>8.1f}"
    speed = get_speed(config, seconds, profile, gpus)
    yield f"  {'total':<34}{seconds * 1e3:>10.1f}"
    yield (
        f"  {speed['tokens_per_s_per_gpu']:,.0f} tokens/s and {speed['tflops_per_gpu']:.0f} TFLOP/s a GPU, "
        f"{speed['share_of_peak'] * 100:.1f}% of {profile.peak_tflops:.0f}"
    )


def get_speed(config: TransformerRun, seconds: float, profile: Profile, gpus: int) -> dict[str, float]:
    """Tokens and FLOPs of one GPU in a second."""
    tokens = config.batch.global_batch * config.data.seq_length / seconds / gpus
    tflops = tokens * config.model.flops_per_token(config.data.seq_length) / 1e12
    return {
        "tokens_per_s_per_gpu": tokens,
        "tflops_per_gpu": tflops,
        "share_of_peak": tflops / profile.peak_tflops,
    }


def describe_explanation(profile: Profile, assumptions: Sequence[str] = ASSUMPTIONS) -> Iterator[str]:
    """What is assumed."""
    yield "\nassumptions"
    yield from (f"  {assumption}" for assumption in assumptions)
    yield f"  Of profile {profile.name}, assumed and not measured: {', '.join(profile.assumed) or 'nothing'}."


def as_values(
    config: TransformerRun, plan: Plan, profile: Profile, advice: Sequence[Suggestion], more: More
) -> dict[str, Any]:
    """Everything in the report as plain values: bytes, seconds."""
    dims = plan.layout.dims
    return get_plan_values(config, plan, profile, dims.ranks) | {
        "advice": [_advice_values(suggestion, dims.ranks) for suggestion in advice]
        + ([_advice_values(more[1], more[0])] if more else []),
    }


def get_plan_values(config: TransformerRun, plan: Plan, profile: Profile, gpus: int) -> dict[str, Any]:
    """Layout, memory, communication and step of a GPU as plain values."""
    layout, dims = plan.layout, plan.layout.dims
    return {
        "layout": {"tensor": dims.tensor, "context": dims.context, "data": dims.data, "expert": dims.expert}
        | {
            "expert_tensor": dims.expert_tensor,
            "sequence": layout.sequence,
            "sharding": layout.sharding,
            "shard_group_size": layout.shard_group_size,
        }
        | {"micro_batches": plan.micro_batches},
        "model": {"parameters": sum(map(prod, config.model.canonical_shapes().values()))},
        "batch": {"global_batch": config.batch.global_batch, "growth": get_growth(config)},
        "memory": {
            "fits": plan.fits,
            "reason": None if plan.fits else f"{plan.total / GIB:.1f} GiB of {plan.capacity / GIB:.1f} on each GPU",
            "capacity": plan.capacity,
            "total": plan.total,
            "categories": by_category(plan.items),
            "items": [{"category": i.category, "what": i.what, "bytes": i.size} for i in plan.items],
        },
        "communication": [_transfer_values(plan, transfer, profile) for transfer in plan.transfers],
        "step": {"seconds": plan.step.seconds, "parts": plan.step.parts}
        | get_speed(config, plan.step.seconds, profile, gpus),
        "profile": profile.model_dump(mode="json"),
        "assumptions": list(ASSUMPTIONS),
    }


def _transfer_values(plan: Plan, transfer: Transfer, profile: Profile) -> dict[str, Any]:
    times = _times(plan, transfer)
    return {
        "axis": transfer.axis,
        "ranks": transfer.ranks,
        "collective": transfer.collective,
        "what": transfer.what,
        "phase": transfer.phase,
        "calls": transfer.calls * times,
        "bytes_each": transfer.size,
        "bytes_sent": transfer.sent * times,
        "seconds": transfer.seconds(profile) * times,
        "beside": transfer.hidden,
    }


def _advice_values(advice: Suggestion, gpus: int) -> dict[str, Any]:
    changes = [change for group in advice.changes for change in group]
    return {"gpus": gpus, "set": changes, "bytes": advice.plan.total, "seconds": advice.plan.step.seconds}
