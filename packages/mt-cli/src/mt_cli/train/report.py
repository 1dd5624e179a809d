"""What a run says of itself: a line before torch is imported, how it will run before step 1, and its result at the end.

Only the first rank calls these; all go to stderr, so that stdout has the lines of the steps.
"""

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mt_cli.run_config import FullConfig
from mt_cli.train.run_lock import CONFIG
from mt_core.config.run_config import sequence_lengths
from mt_core.contracts import MetricSink
from mt_core.plugins import component, components
from mt_core.progress import format_duration
from mt_data.batching.batch_sizes import count_samples, make_batch_sizes

if TYPE_CHECKING:
    import torch

    from mt_core.distributed.mesh import Mesh

Rows = Iterator[tuple[str, str]]
MOST_SOURCES = 3
"""Corpora that are named; of more, their number is told."""


def print_rows(rows: Rows) -> None:
    """Print two columns."""
    for name, text in rows:
        print(f"{name:<12}{text}", file=sys.stderr, flush=True)


def describe_run(config: FullConfig) -> str:
    """Say what is trained, how long and where; needs no torch."""
    parameters = sum(map(prod, config.model.canonical_shapes().values()))
    batch, steps = config.batch.global_batch, config.train.steps
    length = " + ".join(f"{length:,}" for length in sequence_lengths(config.data))
    work = f"{steps:,} step{'s' if steps > 1 else ''} of {batch:,} × {length} tokens"
    return f"training a {config.model.kind} of {parameters:,} parameters: {work}, into {config.runtime.run_dir}"


def describe_start(config: FullConfig, model: "torch.nn.Module", mesh: "Mesh", device: "torch.device") -> Rows:
    """Yield rows on the device, the back ends and the data."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    threads = torch.get_num_threads()
    count = "" if device.type == "cuda" else f", {threads} thread{'s' if threads > 1 else ''}"
    ranks = f"{mesh.world.size} ranks, each {name}" if mesh.world.size > 1 else name
    yield "device", f"{ranks}{count}, {config.precision.dtype}"
    compiled = "compiled" if config.runtime.compile else "not compiled"
    cores = ", ".join(f"attention {core}" for core in _name_cores(config, model, device))
    yield "back ends", ", ".join(filter(None, (cores, f"optimizer {config.optim.name}", compiled)))
    yield "data", describe_data(config)


def _name_cores(config: FullConfig, model: "torch.nn.Module", device: "torch.device") -> Iterator[str]:
    """Yield the name of the attention core that the model runs, if it has attention."""
    choose = getattr(model, "choose_core", None)
    if choose is not None:
        chosen = choose(device, *([] if config.model.kind == "gpt" else ["bidirectional"]))
        yield from (name for name in components("attention") if component("attention", name) is chosen)


def describe_data(config: FullConfig) -> str:
    """Name the corpora and what the run reads of them: documents, tokens or conversations, and epochs."""
    from mt_data.config import FIMData, GPTData, SFTData
    from mt_data.indexed.reader import IndexedReader
    from mt_data.tools.epoch_plan import plan_sources
    from mt_data.tools.plan import count_sources

    data = config.data
    if not isinstance(data, GPTData | FIMData | SFTData):
        return f"{data.kind}"
    sources, cut = count_sources(data, 0, config.runtime.seed)
    names = ", ".join(source.prefix for source in sources)
    if isinstance(data, SFTData):
        amount = f"{sum(source.units or 0 for source in sources):,} conversations"
    else:
        documents = sum(IndexedReader(source.prefix).document_count for source in sources)
        many = f"{documents:,} document{'s' if documents > 1 else ''}"
        amount = f"{many}, {sum(source.tokens or 0 for source in sources):,} tokens to train on"
    samples = count_samples(make_batch_sizes(config.batch), config.train.steps)
    epochs = sorted(plan.epochs for plan in plan_sources(sources, samples, cut))
    spread = f"{epochs[0]:.3g}" if len(epochs) == 1 else f"{epochs[0]:.3g} to {epochs[-1]:.3g}"
    named = names if len(sources) <= MOST_SOURCES else f"{len(sources)} corpora"
    return f"{named}: {amount}; the run reads {spread} epochs"


class RunSummary:
    """A receiver of metrics that keeps what the end of the run reports."""

    name: ClassVar[str] = "summary"

    def __init__(self) -> None:
        self.first: Mapping[str, float | int | str] | None = None
        self.last: Mapping[str, float | int | str] = {}
        self.valid: float | None = None
        self.seconds = self.tokens = 0.0

    def write(self, metrics: Mapping[str, float | int | str]) -> None:
        """Note the losses, and add up the time and tokens of steps."""
        if "valid_loss" in metrics:
            self.valid = float(metrics["valid_loss"])
        if "loss" not in metrics:
            return
        self.first = self.first or metrics
        seconds = float(metrics["step_ms"]) / 1e3 * (int(metrics["step"]) - int(self.last.get("step", 0)))
        if self.last:  # the first line after a resume says nothing of the steps before
            self.seconds += seconds
            self.tokens += float(metrics["tokens_per_s"]) * seconds
        self.last = metrics

    def close(self) -> None:
        """Nothing to flush."""

    def describe(self, device: "torch.device") -> Rows:
        """Yield rows on losses, rate and memory; none of losses if no step was logged."""
        if self.first is not None:
            begin = f", {self.first['loss']:.4f} at step {self.first['step']}" if self.first is not self.last else ""
            valid = f"; validation {self.valid:.4f}" if self.valid is not None else ""
            yield "loss", f"{self.last['loss']:.4f} at step {self.last['step']}{begin}{valid}"
        if self.seconds:
            yield "speed", f"{self.tokens / self.seconds:,.0f} tokens/s; {format_duration(self.seconds)} of steps"
        yield "memory", f"{get_peak_memory(device) / 2**30:.2f} GiB at most"


def get_peak_memory(device: "torch.device") -> int:
    """Most bytes that this process has taken: of the GPU where it trains on one, else of the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report_end(config: FullConfig, sinks: Sequence[MetricSink], step: int, device: "torch.device") -> None:
    """Print what the summary among the receivers of metrics has noted, and what to do next."""
    for sink in sinks:
        if isinstance(sink, RunSummary):
            print_rows(sink.describe(device))
    print_rows(describe_next(config, step))


def describe_next(config: FullConfig, step: int) -> Rows:
    """Yield commands that go on from here."""
    from mt_cli.train.run_directory import list_later_configs

    run_dir = Path(config.runtime.run_dir)
    newest = [run_dir / CONFIG, *list_later_configs(run_dir)][-1]
    if step < config.train.steps:
        yield "next", f"mt train {newest}   goes on"
        return
    has_tokenizer = (run_dir / "tokenizer").is_dir()
    commands = []
    if has_tokenizer and config.model.kind == "gpt":
        commands += [f'mt generate {run_dir} --prompt "…"', f"mt eval perplexity --load-dir {run_dir} --data TEXT"]
    commands += [f"mt train {newest} --set train.steps={2 * config.train.steps}"]
    for number, command in enumerate(commands):
        yield "" if number else "next", command
