"""The pictures are well-formed, to scale, labelled, and readable on light and dark."""

import xml.etree.ElementTree as ElementTree

import pytest

from core.planning.configs import h200, run
from mt_core.planning.memory import GIB, by_category
from mt_core.planning.plan import plan
from mt_core.planning.svg import LEFT, RIGHT, WIDTH, draw_memory, draw_timeline

SVG = "{http://www.w3.org/2000/svg}"


def made(ranks: int, *overrides: str):
    return plan(run("batch.global_batch=64", *overrides), ranks, h200())


def bars(root: ElementTree.Element) -> list[tuple[str, float, float, float]]:
    """What a bar is, its left edge, its top, its width."""
    found = []
    for group in root.iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert rect is not None
        found.append((title.text or "", *(float(rect.get(key, "nan")) for key in ("x", "y", "width"))))
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def test_memory_has_a_bar_a_rank_to_scale():
    planned = made(8, "parallel.tensor=4", "parallel.sharding=zero1")
    root = ElementTree.fromstring(draw_memory(planned, "8 × H200"))
    sums = by_category(planned.items)
    rows = {top: [bar for bar in bars(root) if bar[2] == top] for _, _, top, _ in bars(root)}
    assert len(rows) == 8
    for row in rows.values():
        assert [told for told, *_ in row] == [f"{name} {size / GIB:.1f} GiB" for name, size in sums.items()]
        (_, _, _, first), *_ = row
        scale = first / sums["weights"]
        assert [width for *_, width in row] == pytest.approx([size * scale for size in sums.values()], abs=0.3)
    assert {"rank 0 (data 0, tensor 0)", "rank 7 (data 1, tensor 3)", "139.8 GiB"} <= set(texts(root))
    assert f"8 × H200: {planned.total / GIB:.1f} GiB a rank, fits" in texts(root)
    assert all(any(text.startswith(f"{name} ") for text in texts(root)) for name in sums)


def test_memory_beyond_the_capacity_crosses_its_line():
    root = ElementTree.fromstring(draw_memory(made(1), "one"))
    line = next(e for e in root.iter(f"{SVG}line") if "limit" in e.get("class", ""))
    ends = [left + width for _, left, _, width in bars(root)]
    assert max(ends) > float(line.get("x1", "nan"))
    assert max(ends) <= WIDTH - RIGHT
    assert "rank 0" in texts(root)


def test_many_ranks_are_summed_up():
    root = ElementTree.fromstring(draw_memory(made(64), "many"))
    assert len({top for _, _, top, _ in bars(root)}) == 16
    assert "and 48 more ranks, which hold the same" in texts(root)


def test_the_timeline_has_a_lane_for_each_axis_that_communicates():
    planned = made(8, "parallel.tensor=2", "parallel.context=2", "parallel.sharding=zero1", "batch.micro_batch=16")
    root = ElementTree.fromstring(draw_timeline(planned, "8 × H200"))
    lanes = [text for text in texts(root) if text.endswith(" axis") or text == "arithmetic"]
    assert lanes == ["arithmetic", "tensor axis", "context axis", "data axis"]
    assert {"0 ms", "arithmetic waits for it", "beside arithmetic", "forward", "backward", "optimizer"} <= set(
        texts(root)
    )
    assert f"8 × H200: {planned.step.seconds * 1e3:,.0f} ms a step, 2 micro-batches a rank" in texts(root)


def test_the_timeline_fills_its_width_and_stays_small():
    planned = made(1, "batch.global_batch=4096")
    text = draw_timeline(planned, "one")
    found = bars(ElementTree.fromstring(text))
    assert min(left for _, left, _, _ in found) == LEFT
    assert max(left + width for _, left, _, width in found) == pytest.approx(WIDTH - RIGHT, abs=0.5)
    assert found[0][0].startswith("forward and backward ")  # 4,096 micro-batches, each too narrow to see
    assert len(text) < 20_000


@pytest.mark.parametrize("draw", [draw_memory, draw_timeline])
def test_pictures_need_nothing_else_and_follow_the_reader_s_colours(draw):
    text = draw(made(4), "a < b & c")
    assert "prefers-color-scheme: dark" in text
    assert "a &lt; b &amp; c" in text
    assert "href" not in text
    assert "url(" not in text
