"""A plan as SVG: memory of each rank, and the timeline of a step. Plain text, readable on light and on dark."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from math import floor, log10
from typing import get_args

from mt_core.distributed.topology import AXES, ParallelDims
from mt_core.planning.memory import CATEGORIES, GIB, by_category
from mt_core.planning.plan import Plan
from mt_core.planning.step_time import Lane, Span

STYLE = """<style>
  .ground { fill: #ffffff } text { fill: #1f2328; font: 12px sans-serif } .title { font-size: 15px; font-weight: 600 }
  .inside { fill: #101418; font-size: 11px } .line { stroke: #656d76; stroke-width: 1 } .limit { stroke: #c4314b }
  .dashed { stroke-dasharray: 5 3; stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } text { fill: #e6edf3 } .line { stroke: #8b949e } .limit { stroke: #ff7b8a }
    .inside { fill: #101418 }
  }
</style>"""
COLOURS = {
    "weights": "#7cb5ec",
    "gradients": "#f7a35c",
    "master weights": "#90d7a7",
    "moments": "#c3a6e8",
    "activations": "#f2d16b",
    "logits": "#ef8fa8",
    "recompute": "#e4b48a",
    "buffers": "#6fcfcf",
    "reserved": "#b8bec6",
    "forward": "#7cb5ec",
    "backward": "#f7a35c",
    "optimizer": "#c3a6e8",
    "waiting": "#ef8fa8",
    "hidden": "#90d7a7",
}
WIDTH, LEFT, RIGHT = 960, 230, 30
BAR, GAP, TOP = 24, 8, 56
MOST_RANKS = 16
"""Ranks that are drawn; further ones are alike."""


def draw_memory(plan: Plan, title: str) -> str:
    """Stacked bars, one a rank, with the GPU's capacity as a line."""
    dims, sums = plan.layout.dims, by_category(plan.items)
    ranks = min(dims.ranks, MOST_RANKS)
    scale = (WIDTH - LEFT - RIGHT) / max(plan.total, plan.capacity) / 1.03
    bottom = TOP + ranks * (BAR + GAP)
    body: list[str] = []
    for rank in range(ranks):
        y = TOP + rank * (BAR + GAP)
        body.append(draw_text(LEFT - 10, y + 16, _label_rank(rank, dims), anchor="end"))
        x = float(LEFT)
        for category, size in sums.items():
            tooltip = f"{category} {size / GIB:.1f} GiB"
            body.append(_bar(x, y, size * scale, colour=COLOURS[category], label=f"{size / GIB:.1f}", tooltip=tooltip))
            x += size * scale
    x = LEFT + plan.capacity * scale
    body.append(f'<line class="limit dashed" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{bottom}"/>')
    body.append(draw_text(x, TOP - 12, f"{plan.capacity / GIB:.1f} GiB", anchor="end"))
    if dims.ranks > ranks:
        body.append(draw_text(LEFT, bottom + 12, f"and {dims.ranks - ranks} more ranks, which hold the same"))
        bottom += 20
    legend = {c: f"{c} {sums[c] / GIB:.1f} GiB" for c in CATEGORIES if c in sums}
    body += _legend(legend, bottom + 14)
    heading = f"{title}: {plan.total / GIB:.1f} GiB a rank, {'fits' if plan.fits else 'does not fit'}"
    return make_document(heading, body, bottom + 14 + 22 * -(-len(legend) // 4) + 8)


def draw_timeline(plan: Plan, title: str) -> str:
    """Lanes for arithmetic and for each axis that communicates, to scale."""
    seconds, scale = plan.step.seconds, (WIDTH - LEFT - RIGHT) / plan.step.seconds
    lanes = [lane for lane in get_args(Lane) if any(s.lane == lane for s in plan.step.spans)]
    body: list[str] = []
    for row, lane in enumerate(lanes):
        y = TOP + row * (BAR + GAP)
        body.append(draw_text(LEFT - 10, y + 16, "arithmetic" if lane == "compute" else f"{lane} axis", anchor="end"))
        for span in _merge_narrow([s for s in plan.step.spans if s.lane == lane], 2 / scale):
            tooltip = f"{span.name} {(span.end - span.start) * 1e3:.1f} ms"
            width = (span.end - span.start) * scale
            body.append(
                _bar(LEFT + span.start * scale, y, width, colour=_colour(span), label=span.name, tooltip=tooltip)
            )
    bottom = TOP + len(lanes) * (BAR + GAP)
    body.append(f'<line class="line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in list_ticks(seconds * 1e3):
        x = LEFT + tick / 1e3 * scale
        body.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        body.append(draw_text(x, bottom + 18, f"{tick:g} ms", anchor="middle"))
    legend = {"forward": "forward", "backward": "backward", "optimizer": "optimizer"}
    if len(lanes) > 1:
        legend |= {"waiting": "arithmetic waits for it", "hidden": "beside arithmetic"}
    body += _legend(legend, bottom + 34)
    heading = f"{title}: {seconds * 1e3:,.0f} ms a step, {plan.micro_batches} micro-batches a rank"
    return make_document(heading, body, bottom + 34 + 22 * -(-len(legend) // 4) + 8)


def _merge_narrow(spans: Iterable[Span], narrow: float) -> list[Span]:
    """Merge neighbours that are too narrow to see into one span."""
    merged: list[Span] = []
    for span in spans:
        last = merged[-1] if merged else None
        if last and last.hidden == span.hidden and span.end - span.start < narrow and span.start - last.end < narrow:
            names = last.name if span.name in last.name else f"{last.name} and {span.name}"
            merged[-1] = Span(span.lane, names, last.start, span.end, span.hidden)
        else:
            merged.append(span)
    return merged


def _colour(span: Span) -> str:
    if span.hidden:
        return COLOURS["hidden"]
    return COLOURS[span.name.split(" and ")[0]] if span.lane == "compute" else COLOURS["waiting"]


def _label_rank(rank: int, dims: ParallelDims) -> str:
    """Return a rank's number and its position on every axis of more than one rank."""
    positions = dims.coordinates(rank)
    names = [f"{axis} {positions[axis]}" for axis in AXES if dims.sizes[axis] > 1]
    return f"rank {rank}" + (f" ({', '.join(names)})" if names else "")


def list_ticks(end: float) -> Iterator[float]:
    """Five to ten round numbers from 0."""
    power = 10.0 ** floor(log10(end))
    unit = next(power * step for step in (0.1, 0.2, 0.5, 1.0) if end / (power * step) <= 10)
    yield from (round(unit * n, 9) for n in range(int(end / unit) + 1))


def _legend(entries: dict[str, str], top: float) -> Iterator[str]:
    for index, (name, label) in enumerate(entries.items()):
        x, y = 24 + index % 4 * 230, top + index // 4 * 22
        yield f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[name]}"/>'
        yield draw_text(x + 20, y + 12, label)


def _bar(x: float, y: float, width: float, *, colour: str, label: str, tooltip: str) -> str:
    bar = f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0.3):.1f}" height="{BAR}" fill="{colour}"/>'
    inside = ""
    if width > 7 * len(label) + 4:
        inside = (
            f'<text class="inside" x="{x + width / 2:.1f}" y="{y + 16}" text-anchor="middle">{escape(label)}</text>'
        )
    return f"<g><title>{escape(tooltip)}</title>{bar}{inside}</g>"


def draw_text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    """A line of text; `anchor` says whether `x` is its start, middle or end."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def make_document(heading: str, body: Sequence[str], height: float, *, width: int = WIDTH) -> str:
    """A whole picture under its heading, with the colours of light and dark."""
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>',
            f"<title>{escape(heading)}</title>",
            STYLE,
            '<rect class="ground" width="100%" height="100%"/>',
            f'<text class="title" x="24" y="26">{escape(heading)}</text>',
            *body,
            "</svg>\n",
        )
    )
