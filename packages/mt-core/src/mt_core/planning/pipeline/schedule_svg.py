"""A pipeline's timeline as SVG: a row for each rank, a bar for each pass, with the number of its microbatch.

Forward, backward, input and weight passes differ in colour and in lightness, so that they can be told apart without
seeing colours; later chunks of a rank are paler and have a line above them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

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
DIGIT, MARGIN = 7, 4
"""Width of a digit of a microbatch's number, and of what is left beside the number."""
MOST_WIDE, BREAK = 4000, 40
"""Width of the largest picture, and of the gap in one that shows only the begin and the end of a step."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """Where on the picture a time is; the middle of a long step is left out, so that numbers stay legible."""

    seconds: float
    rate: float
    """Width of a second."""

    @property
    def shown(self) -> float:
        """Seconds from the begin that are drawn, and again to the end; all if that is all there is."""
        room = (MOST_WIDE - LEFT - RIGHT - BREAK) / 2 / self.rate
        return room if self.seconds * self.rate > MOST_WIDE - LEFT - RIGHT else self.seconds

    @property
    def left_out(self) -> float:
        """Seconds of the middle that are not drawn."""
        return max(self.seconds - 2 * self.shown, 0.0)

    @property
    def width(self) -> int:
        """Width of the whole picture."""
        return MOST_WIDE if self.left_out else round(LEFT + RIGHT + self.seconds * self.rate)

    def place(self, start: float, end: float) -> Iterator[tuple[float, float]]:
        """Left edge and width of what is drawn from one time to another: nothing, one piece or two."""
        first = min(end, self.shown)
        if start < first:
            yield LEFT + start * self.rate, (first - start) * self.rate
        resumed = self.shown + self.left_out
        if self.left_out and end > resumed:
            begun = max(start, resumed)
            yield LEFT + BREAK + (begun - self.left_out) * self.rate, (end - begun) * self.rate


def draw_schedule(timeline: Timeline, title: str, *, unit: str = "", factor: float = 1.0) -> str:
    """The whole step; times are shown after multiplication by `factor`, with `unit`."""
    lengths = sorted(event.end - event.start for events in timeline.events for event in events)
    short = max(lengths[len(lengths) // 4], timeline.seconds * 1e-6)  # a quarter of all passes may be shorter
    needed = DIGIT * len(str(timeline.schedule.microbatches - 1)) + MARGIN + 1
    scale = _Scale(timeline.seconds, max(needed / short, (WIDTH - LEFT - RIGHT) / timeline.seconds))
    body: list[str] = [IDLE]
    for rank, events in enumerate(timeline.events):
        y = TOP + rank * (BAR + GAP)
        body.append(draw_text(LEFT - 10, y + 16, f"rank {rank}", anchor="end"))
        for x, wide in scale.place(0, timeline.seconds):
            body.append(f'<rect class="idle" x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}"/>')
        for event in events:
            body += _draw_event(event, timeline, y, scale, factor)
    bottom = TOP + len(timeline.events) * (BAR + GAP)
    for time, label in _list_times(scale, factor):
        for x, _ in scale.place(time, time + 1e-9 * timeline.seconds):
            body.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
            body.append(draw_text(x, bottom + 18, f"{label} {unit}".strip(), anchor="middle"))
    if scale.left_out:
        words = f"{scale.left_out * factor:.4g} {unit}".strip() + " left out"
        body.append(draw_text(scale.width / 2, TOP - 8, words, anchor="middle"))
    body += _draw_legend(timeline, bottom + 34)
    heading = f"{title}: bubble {timeline.bubble * 100:.1f}%"
    return make_document(heading, body, bottom + 64, width=scale.width)


def _list_times(scale: _Scale, factor: float) -> Iterator[tuple[float, str]]:
    """Round times; of a step whose middle is left out, the edges of what is drawn."""
    if scale.left_out:
        edges = (0.0, scale.shown * (1 - 1e-6), scale.seconds - scale.shown * (1 - 1e-6), scale.seconds)
        yield from ((edge, f"{edge * factor:.4g}") for edge in edges)
    else:
        yield from ((tick / factor, f"{tick:g}") for tick in list_ticks(scale.seconds * factor))


def _draw_event(event: Event, timeline: Timeline, y: float, scale: _Scale, factor: float) -> Iterator[str]:
    """One bar, or two halves one above the other for passes that run together."""
    high = BAR / len(event.step.passes)
    times = f"{event.start * factor:.4g} to {event.end * factor:.4g}"
    for x, wide in scale.place(event.start, event.end):
        for number, action in enumerate(event.step.passes):
            top = y + number * high
            yield f"<g><title>{action}: {times}</title>"
            yield _draw_bar(action, timeline, (x, top), (max(wide - 0.6, 0.2), high - 0.6))
            if wide >= DIGIT * len(str(action.microbatch)) + MARGIN:
                baseline = top + high / 2 + (4 if high == BAR else 3.5)
                size = "" if high == BAR else ' style="font-size: 10px"'
                label = f'<text class="inside" x="{x + wide / 2:.1f}" y="{baseline:.1f}" text-anchor="middle"{size}>'
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
