"""A pipeline's timeline as SVG: a row for each rank, a bar for each pass, with the number of its microbatch.

Forward, backward, input and weight passes differ in colour and in lightness, so that they can be told apart without
seeing colours; later chunks of a rank are paler and have a line above them.
"""

from collections.abc import Iterator
from math import ceil

from mt_core.pipeline.actions import Action, PassKind
from mt_core.pipeline.simulator import Event, Timeline
from mt_core.planning.svg import BAR, GAP, RIGHT, TOP, WIDTH, draw_text, list_ticks, make_document

COLOURS: dict[PassKind, str] = {"F": "#56a7e0", "B": "#f0a03c", "I": "#f6d55c", "W": "#8fd1b4"}
NAMES: dict[PassKind, str] = {
    "F": "F forward",
    "B": "B backward",
    "I": "I gradients of inputs",
    "W": "W gradients of weights",
}
IDLE = """<style>
  .idle { fill: #eceff2 }
  @media (prefers-color-scheme: dark) { .idle { fill: #21262d } }
</style>"""
LEFT = 70
NUMBER = 20
"""Width at which a bar has room for the number of a microbatch."""
MOST_WIDE = 4000
NO_TOOLTIP = 3
"""Width below which a bar is drawn without its times."""
NARROW = 0.4
"""Width below which bars are not drawn one by one."""


def draw_schedule(timeline: Timeline, title: str, *, unit: str = "", factor: float = 1.0) -> str:
    """The whole step; times are shown after multiplication by `factor`, with `unit`."""
    shortest = min(event.end - event.start for events in timeline.events for event in events if event.end > event.start)
    wanted = LEFT + RIGHT + NUMBER * timeline.seconds / shortest
    width = min(max(WIDTH, ceil(wanted)), MOST_WIDE)
    scale = (width - LEFT - RIGHT) / timeline.seconds
    body: list[str] = [IDLE]
    for rank, events in enumerate(timeline.events):
        y = TOP + rank * (BAR + GAP)
        body.append(draw_text(LEFT - 10, y + 16, f"rank {rank}", anchor="end"))
        body.append(f'<rect class="idle" x="{LEFT}" y="{y}" width="{width - LEFT - RIGHT}" height="{BAR}"/>')
        for event in events:
            body += _draw_event(event, timeline, y, scale, factor)
    bottom = TOP + len(timeline.events) * (BAR + GAP)
    body.append(f'<line class="line" x1="{LEFT}" x2="{width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for tick in list_ticks(timeline.seconds * factor):
        x = LEFT + tick / factor * scale
        body.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        body.append(draw_text(x, bottom + 18, f"{tick:g} {unit}".strip(), anchor="middle"))
    body += _draw_legend(timeline, bottom + 34)
    return make_document(f"{title}: bubble {timeline.bubble * 100:.1f}%", body, bottom + 64, width=width)


def _draw_event(event: Event, timeline: Timeline, y: float, scale: float, factor: float) -> Iterator[str]:
    """One bar, or two halves one above the other for passes that run together."""
    passes, x, wide = event.step.passes, LEFT + event.start * scale, (event.end - event.start) * scale
    if wide < NARROW:
        return
    high = BAR / len(passes)
    for number, action in enumerate(passes):
        if wide < NO_TOOLTIP:
            yield _draw_bar(action, timeline, (x, y + number * high), (wide, high))
            continue
        times = f"{event.start * factor:.4g} to {event.end * factor:.4g}"
        yield f"<g><title>{action}: {times}</title>"
        yield _draw_bar(action, timeline, (x, y + number * high), (max(wide - 0.6, NARROW), high - 0.6))
        if wide >= 7 * len(str(action.microbatch)) + 4:
            centre, baseline = x + wide / 2, y + number * high + high / 2 + (4 if high == BAR else 3.5)
            size = "" if high == BAR else ' style="font-size: 10px"'
            label = f'<text class="inside" x="{centre:.1f}" y="{baseline:.1f}" text-anchor="middle"{size}>'
            yield f"{label}{action.microbatch}</text>"
        yield "</g>"


def _draw_bar(action: Action, timeline: Timeline, corner: tuple[float, float], size: tuple[float, float]) -> str:
    chunk, chunks = action.chunk, timeline.schedule.placement.chunks
    (x, y), (wide, high) = corner, size
    colour = _pale(COLOURS[action.kind], 0.55 * chunk / (chunks - 1) if chunk else 0.0)
    bar = f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" fill="{colour}"/>'
    if chunk:
        bar += f'<rect x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="2" fill="{COLOURS[action.kind]}"/>'
    return bar


def _pale(colour: str, share: float) -> str:
    """A colour mixed with white."""
    values = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * share):02x}" for value in values)


def _draw_legend(timeline: Timeline, y: float) -> Iterator[str]:
    used = {a.kind for rank in range(len(timeline.events)) for a in timeline.schedule.list_passes(rank)}
    x = float(LEFT)
    for kind, name in NAMES.items():
        if kind in used:
            yield f'<rect x="{x}" y="{y}" width="14" height="14" fill="{COLOURS[kind]}"/>'
            yield draw_text(x + 20, y + 12, name)
            x += 7 * len(name) + 40
    if timeline.schedule.placement.chunks > 1:
        yield draw_text(x, y + 12, "paler: later chunks of the rank")
