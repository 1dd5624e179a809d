"""Compare the measured times of a pipeline's passes with its simulator, on GPUs of one machine.

usage: pipeline_timeline.py PRESET --ranks 2 [--steps 8] [--warmup 4] [--schedules NAME …] [--set section.field=value …]

Each schedule has processes of its own. The medians of the passes of each stage, taken with CUDA events between the
arrival of a pass's input and its end, and that of one message between two GPUs are what the simulator is given. Printed
for each schedule: the measured and the simulated time from the first pass to the last, and their bubbles.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_steps import RankSteps
from torch import Tensor
from torch.cuda import Event
from torch.multiprocessing.spawn import spawn

from mt_cli.run_config import load_run_config
from mt_core.distributed.mesh import Axis
from mt_core.parallel.pipeline.runtime import Edge, ScheduleRun
from mt_core.pipeline.actions import Action
from mt_core.pipeline.schedule_table import build_schedule, get_placement, get_size
from mt_core.pipeline.simulator import StageCosts, Timeline, simulate
from mt_core.pipeline.transfers import Message

Seconds = dict[str, list[float]]
"""By kind of pass and stage, such as "F 1"."""


class Stopwatch:
    """Records when each pass of this rank begins to compute, and when it ends."""

    def __init__(self) -> None:
        self.passes: list[tuple[str, Event, Event]] = []
        do, receive = ScheduleRun._do, ScheduleRun._receive

        def timed_do(run: ScheduleRun, action: Action) -> None:
            self.begin = record_event()
            do(run, action)
            stage = run.pipeline.placement.get_stage(run.pipeline.rank, action.chunk)
            self.passes.append((f"{action.kind} {stage}", self.begin, record_event()))

        def timed_receive(run: ScheduleRun, message: Message) -> Edge:
            tensors = receive(run, message)
            self.begin = record_event()
            return tensors

        ScheduleRun._do, ScheduleRun._receive = timed_do, timed_receive


def record_event() -> Event:
    """An event of the current stream, now."""
    event = Event(enable_timing=True)
    event.record()
    return event


def run(rank: int, args: argparse.Namespace, schedule: str, folder: str) -> None:
    """Time the steps of one rank, and write what it measured."""
    config = make_config(args, schedule)
    steps, watch = RankSteps(config, rank, args.ranks, folder), Stopwatch()
    passes: Seconds = defaultdict(list)
    spans, times = [], []
    for step in range(args.warmup + args.steps):
        watch.passes.clear()
        dist.barrier()
        torch.cuda.synchronize()
        begin, start = time.perf_counter(), record_event()
        steps.run(step)
        torch.cuda.synchronize()
        if step >= args.warmup:
            times.append(time.perf_counter() - begin)
            spans.append(start.elapsed_time(watch.passes[-1][2]) / 1e3)
            for name, first, last in watch.passes:
                passes[name].append(first.elapsed_time(last) / 1e3)
    send = time_message(config, steps.mesh.pipeline, steps.device)
    measured = {"passes": passes, "spans": spans, "steps": times, "send": send}
    measured["memory"] = torch.cuda.max_memory_allocated() / 2**30
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured))
    dist.destroy_process_group()


def make_config(args: argparse.Namespace, schedule: str) -> Any:
    """The preset with the overrides of the call, on a pipeline of all ranks."""
    overrides = [f"parallel.pipeline={args.ranks}", f"pipeline.schedule={schedule}", *args.overrides]
    return load_run_config([], overrides, args.preset, rules=False)


def time_message(config: Any, pipeline: Axis, device: torch.device) -> float:
    """Seconds of a micro-batch's features from the first rank to the second: half of the way there and back."""
    shape = (config.batch.micro_batch, config.data.seq_length, config.model.hidden_size)
    features: Tensor = torch.randn(shape, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(20):
        begin = record_event()
        if pipeline.rank == 0:
            pipeline.send(features, 1)
            pipeline.receive_(features, 1)
        elif pipeline.rank == 1:
            pipeline.receive_(features, 0)
            pipeline.send(features, 0)
        end = record_event()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 2e3)
    return statistics.median(times)


def play(config: Any, ranks: list[dict[str, Any]], send: float) -> Timeline:
    """Simulate the schedule with the medians of the measured passes."""
    placement = get_placement(config)
    microbatches = config.batch.global_batch // config.batch.micro_batch
    schedule = build_schedule(config.pipeline.schedule, get_size(config, microbatches))
    medians = {name: statistics.median(times) for each in ranks for name, times in each["passes"].items()}
    costs = []
    for stage in range(placement.stages):
        parts = {kind: medians[f"{kind} {stage}"] for kind in "FBIW" if f"{kind} {stage}" in medians}
        costs.append(StageCosts(parts["F"], parts.get("I") or parts["B"], parts.get("W", 0)))  # a whole B is I and W
        print(f"  stage {stage}: " + ", ".join(f"{kind} {seconds * 1e3:.1f} ms" for kind, seconds in parts.items()))
    return simulate(schedule.in_sequence(), costs, send=send)


def main() -> None:
    """Time the schedules one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("preset")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--schedules", nargs="*", default=["1f1b", "interleaved"])
    parser.add_argument("--set", nargs="*", default=[], dest="overrides")
    args = parser.parse_args()
    for schedule in args.schedules:
        with tempfile.TemporaryDirectory() as folder:
            spawn(run, (args, schedule, folder), args.ranks)
            ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(args.ranks)]
        print(f"{args.preset} {' '.join(args.overrides)}, {schedule}")
        timeline = play(make_config(args, schedule), ranks, ranks[0]["send"])
        span = statistics.median(map(max, zip(*(each["spans"] for each in ranks), strict=True)))
        step = statistics.median(map(max, zip(*(each["steps"] for each in ranks), strict=True)))
        bubble, off = span * args.ranks / sum(timeline.work) - 1, timeline.seconds / span - 1
        print(
            f"  passes {span * 1e3:.1f} ms, simulated {timeline.seconds * 1e3:.1f} ({off:+.1%}); "
            f"bubble {bubble:.1%}, simulated {timeline.bubble:.1%}; message {ranks[0]['send'] * 1e3:.2f} ms; "
            f"step {step * 1e3:.1f} ms; peak {max(each['memory'] for each in ranks):.1f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
