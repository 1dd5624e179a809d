"""Counters of the server in Prometheus's text format, version 0.0.4.

Written here rather than by a library: three kinds of metric are forty lines, and no thread but the server's counts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histograms' buckets."""

Labels = tuple[tuple[str, str], ...]


@dataclass
class Counter:
    """A number that only grows, for each combination of labels."""

    help: str
    values: dict[Labels, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, amount: int = 1, **labels: str) -> None:
        """Count."""
        self.values[tuple(labels.items())] += amount

    def total(self, **labels: str) -> int:
        """The sum over all combinations that have these labels."""
        return sum(count for names, count in self.values.items() if labels.items() <= dict(names).items())


@dataclass
class Histogram:
    """How many observations lie below each bound."""

    help: str
    bounds: Sequence[float] = SECONDS
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[sum(value > bound for bound in self.bounds)] += 1
        self.sum += value


@dataclass
class Metrics:
    """Everything that the server counts."""

    requests: Counter = field(default_factory=lambda: Counter("Requests by route and how they ended."))
    prompt_tokens: Counter = field(default_factory=lambda: Counter("Tokens of prompts."))
    new_tokens: Counter = field(default_factory=lambda: Counter("Tokens generated."))
    first_token: Histogram = field(
        default_factory=lambda: Histogram("Seconds from a request's arrival to its first token.")
    )
    duration: Histogram = field(default_factory=lambda: Histogram("Seconds from a request's arrival to its end."))

    def render(self, gauges: Mapping[str, tuple[str, Mapping[str, int]]]) -> str:
        """All metrics as text; `gauges` are present values: name → help, and value by state."""
        lines: list[str] = []
        counters = {
            "mt_requests_total": self.requests,
            "mt_prompt_tokens_total": self.prompt_tokens,
            "mt_generated_tokens_total": self.new_tokens,
        }
        for name, counter in counters.items():
            lines += [f"# HELP {name} {counter.help}", f"# TYPE {name} counter"]
            lines += [f"{name}{_write_labels(labels)} {count}" for labels, count in sorted(counter.values.items())]
        for name, (text, values) in gauges.items():
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge"]
            lines += [f"{name}{_write_labels((('state', s),) if s else ())} {value}" for s, value in values.items()]
        for name, histogram in (
            ("mt_time_to_first_token_seconds", self.first_token),
            ("mt_request_seconds", self.duration),
        ):
            lines += [f"# HELP {name} {histogram.help}", f"# TYPE {name} histogram", *_write_buckets(name, histogram)]
        return "\n".join(lines) + "\n"


def _write_labels(labels: Labels) -> str:
    escaped = ((name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for name, value in labels)
    text = ",".join(f'{name}="{value}"' for name, value in escaped)
    return f"{{{text}}}" if text else ""


def _write_buckets(name: str, histogram: Histogram) -> Iterator[str]:
    below = 0
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        below += count
        yield f'{name}_bucket{{le="{bound}"}} {below}'
    yield f"{name}_sum {histogram.sum!r}"
    yield f"{name}_count {below}"
