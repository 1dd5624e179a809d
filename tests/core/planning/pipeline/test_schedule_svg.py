"""The picture of a schedule has every pass where the timeline has it, and can be read by anyone at any size."""

import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest

from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import build_schedule
from mt_core.pipeline.simulator import StageCosts, Timeline, simulate
from mt_core.planning.pipeline.schedule_svg import BREAK, COLOURS, DIGIT, LEFT, MARGIN, draw_schedule
from mt_core.planning.svg import RIGHT, TOP, WIDTH

SVG = "{http://www.w3.org/2000/svg}"


def play(name: str, ranks: int, microbatches: int, chunks: int = 1) -> Timeline:
    schedule = build_schedule(name, ScheduleSize(ranks, microbatches, chunks))
    return simulate(schedule, [StageCosts()] * schedule.placement.stages)


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("name", "size"), [("1f1b", (4, 8)), ("interleaved", (2, 4, 3)), ("zbv", (4, 8, 2)), ("dualpipev", (2, 4, 2))]
)
def test_every_pass_is_a_bar_at_its_time(name, size):
    timeline = play(name, *size)
    root = ElementTree.fromstring(draw_schedule(timeline, name))
    scale = max(12, (WIDTH - LEFT - RIGHT) / timeline.seconds)  # the width of a digit and its margins
    assert float(root.get("width")) == round(LEFT + RIGHT + scale * timeline.seconds)
    drawn = []
    for group in root.iter(f"{SVG}g"):
        bar, label = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        rank = int((float(bar.get("y")) - TOP) // 32)
        drawn.append((rank, group.find(f"{SVG}title").text, label.text, round(float(bar.get("x")), 1)))
    assert drawn == [
        (rank, f"{action}: {event.start:g} to {event.end:g}", f"{action.microbatch}", pytest.approx(x, abs=0.11))
        for rank, events in enumerate(timeline.events)
        for event in events
        for action in event.step.passes
        for x in [LEFT + event.start * scale]
    ]


def test_the_title_has_the_bubble_and_the_legend_the_kinds():
    root = ElementTree.fromstring(draw_schedule(play("zb-h1", 4, 8), "a < b"))
    words = texts(root)
    assert words[0] == root.find(f"{SVG}title").text == "a < b: bubble 12.5%"
    assert {"F forward", "I gradients of inputs", "W gradients of weights", "rank 0", "rank 3", "0"} <= set(words)
    assert "B backward" not in words
    assert "paler: later chunks of the rank" in texts(ElementTree.fromstring(draw_schedule(play("zbv", 2, 4, 2), "")))


def test_times_have_a_unit():
    words = texts(ElementTree.fromstring(draw_schedule(play("1f1b", 2, 2), "", unit="ms", factor=1e3)))
    assert {"0 ms", "5000 ms"} <= set(words)


def get_luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    values = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values)
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_numbers_stand_out_from_every_colour():
    """Contrast 7 : 1, which is level AAA, with the dark of the numbers; paler chunks have more."""
    dark = get_luminance("#101418")
    assert all((get_luminance(colour) + 0.05) / (dark + 0.05) >= 7 for colour in COLOURS.values())


def test_colours_differ_in_lightness_too():
    light = sorted(map(get_luminance, COLOURS.values()))
    assert all(after - before > 0.05 for before, after in pairwise(light))


def test_of_a_long_step_begin_and_end_are_drawn_with_room_for_all_numbers():
    timeline = play("1f1b", 16, 192)
    text = draw_schedule(timeline, "long", unit="s")
    root = ElementTree.fromstring(text)
    assert len(text) < 600_000
    assert float(root.get("width")) == 4000
    assert root.get("viewBox") == f"0 0 4000 {root.get('height')}"
    groups = list(root.iter(f"{SVG}g"))
    titles = {group.find(f"{SVG}title").text for group in groups}
    assert {"F0: 0 to 1", "B191: 619 to 621"} <= titles
    assert not any(title.startswith("F100:") for title in titles)
    (left_out,) = [word for word in texts(root) if word.endswith(" left out")]
    shown = (4000 - LEFT - RIGHT - BREAK) / (3 * DIGIT + MARGIN + 1)
    assert left_out == f"{621 - shown:.4g} s left out"
    assert {"0 s", "621 s", f"{shown / 2:.4g} s", f"{621 - shown / 2:.4g} s"} <= set(texts(root))
    edges = [float(group.find(f"{SVG}rect").get("x")) for group in groups]
    assert max(edges) < 4000 - RIGHT
    cut = [group for group in groups if group.find(f"{SVG}text") is None]
    assert len(cut) <= 2 * 16  # at the break a pass may be drawn in part


def test_a_picture_follows_the_reader_s_colours_and_needs_nothing_else():
    text = draw_schedule(play("1f1b", 2, 2), "short")
    assert text.count("prefers-color-scheme: dark") == 2
    assert "href" not in text
