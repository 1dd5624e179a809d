"""Writes docs/explanation/parallelism/*.svg: which rank has what. Every number and every cut comes from the code.

usage: python tools/docs/figures.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from memory_map import BLOCKS, BlockShares, RankMemory, StateShard, get_model_config, map_memory
from memory_map import RANKS as FOUR
from svg import RANKS, SHARED, WIDTH, box, document, labelled_box, legend, outline, text

from mt_core.checkpoint.commit_protocol import COMMITTED, META, Ranks
from mt_core.config.sections import PrecisionConfig
from mt_core.distributed.mesh import Axis
from mt_core.distributed.topology import ParallelDims
from mt_core.parallel.context.ring import get_visible_part
from mt_core.parallel.context.zigzag import local_positions
from mt_core.parallel.layout import build_layout
from mt_core.pipeline.rank_schedules import ScheduleSize
from mt_core.pipeline.schedule_table import SCHEDULES, build_schedule
from mt_core.pipeline.simulator import simulate
from mt_core.planning.activations import count_activations
from mt_core.planning.pipeline.schedule_svg import draw_schedule
from mt_core.planning.precision import state_bytes
from mt_core.planning.svg import COLOURS

FOLDER = Path(__file__).parents[2] / "docs" / "explanation" / "parallelism"
LEFT, TOP, ROW = 150, 56, 20
GIB = 2**30


def draw_figures() -> dict[str, str]:
    """Draw every figure: file name → SVG."""
    seen = map_memory()
    return {
        "axes.svg": draw_axes(),
        "data.svg": draw_data([ranks.data for ranks in seen]),
        "tensor.svg": draw_tensor(),
        "sequence.svg": draw_sequence(seen),
        "context.svg": draw_context(),
        "expert.svg": draw_expert([ranks.experts for ranks in seen]),
        "recompute.svg": draw_recompute(),
        "precision.svg": draw_precision(),
        "checkpoints.svg": draw_checkpoints(seen),
        **{f"schedule-{name}.svg": draw_pipeline(name) for name in SCHEDULES},
    }


def draw_pipeline(name: str) -> str:
    """Draw a schedule of four ranks with passes of one length."""
    size = ScheduleSize(FOUR, 2 * FOUR, SCHEDULES[name].chunks[0])
    heading = f"{SCHEDULES[name].title}, {size.ranks} ranks, {size.microbatches} microbatches"
    return draw_schedule(simulate(build_schedule(name, size)), heading)


def draw_axes() -> str:
    """Draw eight ranks and the groups that each axis makes of them."""
    dims = ParallelDims(data=2, context=2, tensor=2, shard=2)
    rows: dict[str, list[list[int]]] = {
        "tensor": dims.groups("tensor"),
        "context": dims.groups("context"),
        "data": dims.groups("data"),
        "data × context": dims.groups("data_context"),
        "shard, of size 2": dims.groups("shard"),
        "replica": dims.groups("replica"),
    }
    wide = (WIDTH - LEFT - 30) / dims.ranks
    body = [text(LEFT + wide * (r + 0.5), TOP + 14, f"rank {r}", anchor="middle") for r in range(dims.ranks)]
    for row, (name, groups) in enumerate(rows.items()):
        y = TOP + 24 + row * 30
        body.append(text(LEFT - 10, y + 16, name, anchor="end"))
        for number, group in enumerate(groups):
            for rank in group:
                label = "+".join(map(str, group))
                body.append(labelled_box(LEFT + wide * rank + 2, y, wide - 4, 24, colour=RANKS[number], label=label))
    heading = "data 2 × context 2 × tensor 2: ranks of one colour form a group of the axis"
    return document(heading, body, TOP + 24 + len(rows) * 30 + 12)


def draw_data(seen: list[dict[str, tuple[StateShard, ...]]]) -> str:
    """Draw the parts of each bucket, or of each unit of FSDP2, that four ranks hold."""
    body: list[str] = []
    wide, high = (WIDTH - LEFT - 30) / FOUR, 4 * ROW + 58
    for panel, name in enumerate(seen[0]):
        y = TOP + panel * high
        each = sum(state.itemsize * state.fraction for state in seen[0][name])
        body.append(text(24, y + 6, f"{name}: {each:g} bytes a parameter on each rank"))
        for row, state in enumerate(seen[0][name]):
            size = f"{state.name}, {state.itemsize} B"
            body.append(text(LEFT - 10, y + 33 + row * ROW, size, anchor="end"))
        for rank, states in enumerate(ranks[name] for ranks in seen):
            x = LEFT + rank * wide
            body.append(text(x + (wide - 14) / 2, y + 17 + 4 * ROW + 22, f"rank {rank}", anchor="middle"))
            for row, state in enumerate(states):
                body += draw_strips(state, x, y + 20 + row * ROW, wide - 14, RANKS[rank])
    heading = "Four data ranks, bf16: coloured is what a rank holds, dashed what it gathers to use it"
    return document(heading, body, TOP + len(seen[0]) * high)


def draw_strips(state: StateShard, x: float, y: float, width: float, colour: str) -> Iterator[str]:
    """Draw one kind of state of one rank, bucket by bucket."""
    if not state.ranges:
        yield outline(x, y, width, ROW - 6, dashed=True)
        return
    total = sum(part.length for part in state.ranges)
    for part in state.ranges:
        length = (width - 3 * (len(state.ranges) - 1)) * part.length / total
        yield outline(x, y, length, ROW - 6)
        start, share = part.start / part.length, (part.stop - part.start) / part.length
        yield box(x + length * start, y, length * share, ROW - 6, colour=colour, tooltip=f"{part.start} to {part.stop}")
        x += length + 3


def draw_tensor() -> str:
    """Draw the canonical tensors of a layer, and of the ends, cut over four ranks."""
    with torch.device("meta"):
        model = get_model_config().build(FOUR)
    shapes, cut = model.config.canonical_shapes(), {}
    for name in (name for name, _ in model.named_parameters() if "layers.1" not in name):
        for rank in range(FOUR):
            for canonical, slices in model.canonical_regions(name, rank, FOUR).items():
                cut.setdefault(canonical, {}).setdefault(tuple((s.start, s.stop) for s in slices), []).append(rank)
    body: list[str] = []
    x, y = 30.0, TOP + 26.0
    for name, parts in cut.items():
        rows, columns = (*shapes[name], 8)[:2]  # a pixel an element, and a vector 8 wide
        if x + max(columns, 105) > WIDTH - 20:
            x, y = 30.0, y + 288
        body.append(text(x, y - 10, name.removesuffix(".weight")))
        for edges, ranks in parts.items():
            body += draw_slice(edges, ranks, (x, y), (rows, columns))
        body.append(outline(x, y, columns, rows))
        x += max(columns, 105) + 32
    body += legend([*((RANKS[r], f"rank {r}") for r in range(FOUR)), (SHARED, "every rank")], 30, y + 258)
    heading = "tensor 4: a layer of 8 heads in 2 key/value groups, and the ends; outputs down, inputs across"
    return document(heading, body, y + 286)


def draw_slice(
    edges: tuple[tuple[int | None, int | None], ...],
    ranks: list[int],
    corner: tuple[float, float],
    size: tuple[float, float],
) -> Iterator[str]:
    """Draw the rectangle that these ranks have: cut along dims whose edges are numbers; several share it in stripes."""
    (x, y), (height, width) = corner, size
    (top, bottom), (left, right) = [
        (a or 0, length if b is None else b)
        for (a, b), length in zip((*edges, (None, None), (None, None))[:2], (height, width), strict=True)
    ]
    colours = [SHARED] if len(ranks) == FOUR else [RANKS[rank] for rank in ranks]
    stripe = (right - left) / len(colours)
    tooltip = f"ranks {', '.join(map(str, ranks))}"
    for number, colour in enumerate(colours):
        yield box(x + left + number * stripe, y + top, stripe, bottom - top, colour=colour, tooltip=tooltip)


def draw_sequence(seen: list[RankMemory]) -> str:
    """Draw the activations of a layer on four ranks: tokens down, features across."""
    body: list[str] = []
    heading = "Activations of a layer on four tensor ranks: tokens down, features across"
    wide, high, column = 26, 40, (WIDTH - 130) / len(seen[0].activations["tensor"])
    for panel, (name, shares) in enumerate(seen[0].activations.items()):
        y = TOP + 8 + panel * (FOUR * (high + 8) + 84)
        body.append(text(24, y + 6, {"tensor": "tensor = 4", "sequence": "tensor = 4, sequence = true"}[name]))
        for number, share in enumerate(shares):
            x = 110 + number * column
            into, _, module = share.location.partition(" ")
            words = [into if into == "into" else "out of", module.removeprefix("of ").rpartition(".")[2]]
            body += [text(x, y + 26 + 14 * line, word) for line, word in enumerate(words)]
            for rank, ranks in enumerate(seen):
                local = ranks.activations[name][number]
                top = y + 50 + rank * (high + 8)
                body.append(outline(x, top, wide, high))
                down = rank * high / FOUR if local.tokens < 1 else 0
                across = rank * wide / FOUR if local.features < 1 else 0
                size = (min(local.features * wide, wide - across), local.tokens * high)
                whole = local.tokens == local.features == 1
                colour = SHARED if whole else RANKS[rank]
                body.append(box(x + across, top + down, *size, colour=colour, tooltip=f"rank {rank}: {share.location}"))
        body += [text(24, y + 74 + rank * (high + 8), f"rank {rank}") for rank in range(FOUR)]
    bottom = TOP + 8 + 2 * (FOUR * (high + 8) + 84) - 20
    body += legend(
        [(SHARED, "the same on every rank"), (RANKS[0], "in its rank's colour: a part")], 24, bottom, apart=200
    )
    return document(heading, body, bottom + 30)


def draw_context() -> str:
    """Draw which tokens four ranks have, and what a ring step computes of the causal square."""
    length, cell = 16, 15
    shares = [local_positions(length, Axis("context", rank, FOUR)).tolist() for rank in range(FOUR)]
    owner = {token: rank for rank, share in enumerate(shares) for token in share}
    body = [text(30, TOP + 14, f"{length} tokens and the rank that holds them:")]
    body += [
        labelled_box(30 + token * 50, TOP + 24, 48, 22, colour=RANKS[rank], label=f"{token}: {rank}")
        for token, rank in sorted(owner.items())
    ]
    top, wide = TOP + 104, length * cell
    body.append(text(30, top - 30, "What each rank computes in a step of the ring: queries down, keys across"))
    for step in range(FOUR):
        x = 30 + step * (WIDTH - 40) / FOUR
        words = "step 0: its own keys" if step == 0 else f"step {step}: keys of the rank {step} before"
        body += [text(x, top - 8, words), outline(x, top, wide - 45, wide - 45)]
        for rank in range(FOUR):
            body += draw_squares(shares, rank, (rank - step) % FOUR, (x, top), (wide - 45) / length)
    body += legend([(RANKS[rank], f"rank {rank}") for rank in range(FOUR)], 30, top + wide - 30)
    return document("context 4: zig-zag shares, and the work of the ring", body, top + wide)


def draw_squares(
    shares: list[list[int]], rank: int, source: int, corner: tuple[float, float], cell: float
) -> Iterator[str]:
    """Draw the pairs of a query and a key that `rank` computes when it holds the keys of `source`."""
    part = get_visible_part(rank, source, len(shares[rank]))
    for query in shares[rank][part.queries]:
        for key in shares[source][part.keys]:
            if not part.causal or key <= query:
                x, y = corner[0] + key * cell, corner[1] + query * cell
                yield box(x, y, cell - 0.7, cell - 0.7, colour=RANKS[rank])


def draw_expert(seen: list[dict[str, BlockShares]]) -> str:
    """Draw what four ranks have of each tensor of a layer: weights in the upper strip, masters in the lower."""
    body: list[str] = []
    wide, high = (WIDTH - LEFT - 30) / FOUR, 44
    for rank in range(FOUR):
        x = LEFT + rank * wide
        body.append(text(x + (wide - 14) / 2, TOP + 8, f"rank {rank}", anchor="middle"))
    for row, name in enumerate(seen[0]):
        y = TOP + 20 + row * high
        body.append(text(LEFT - 10, y + 16, name.removeprefix("layers.0.").removesuffix(".weight"), anchor="end"))
        for rank, blocks in enumerate(ranks[name] for ranks in seen):
            cell = (wide - 14) / BLOCKS
            whole = all(ranks[name].weights == blocks.weights for ranks in seen)
            for block in range(BLOCKS):
                x = LEFT + rank * wide + block * cell
                body += [outline(x, y, cell - 2, 16), outline(x, y + 19, cell - 2, 8)]
                tooltip = f"block {block}"
                widths = (blocks.weights[block] * (cell - 2), blocks.masters[block] * (cell - 2))
                body.append(box(x, y, widths[0], 16, colour=SHARED if whole else RANKS[rank], tooltip=tooltip))
                body.append(box(x, y + 19, widths[1], 8, colour=RANKS[rank], tooltip=f"{blocks.masters[block]:.2f}"))
                if ".experts." in name:
                    body.append(text(x + cell / 2 - 1, y + 12, str(block), anchor="middle", kind="inside"))
    bottom = TOP + 24 + len(seen[0]) * high
    words = "Quarters of each tensor, of a stack of experts one expert. Upper strip: weights. Lower: masters, moments."
    body.append(text(LEFT, bottom + 8, words))
    entries = [(SHARED, "the same on every rank"), (RANKS[0], "in its rank's colour: its own part")]
    body += legend(entries, LEFT, bottom + 20, apart=200)
    heading = "expert 2 × zero1 over four data ranks: four experts, two of them on each rank"
    return document(heading, body, bottom + 50)


def draw_recompute() -> str:
    """Draw the activations of llama3-8b that are kept and computed again, by setting."""
    settings: Mapping[str, dict[str, Any]] = {
        "none": {},
        "selective": {"granularity": "selective"},
        "full, uniform, 1": {"granularity": "full"},
        "full, uniform, 4": {"granularity": "full", "layers": 4},
        "full, block, 16": {"granularity": "full", "method": "block", "layers": 16},
    }
    body: list[str] = []
    for panel, core in enumerate(("sdpa", "eager")):
        y = TOP + 8 + panel * (len(settings) * 30 + 46)
        body.append(text(24, y + 4, f'attention core "{core}"'))
        settled = {name: count_activations(*configure_llama(core, setting)) for name, setting in settings.items()}
        scale = (WIDTH - LEFT - 130) / max(each.saved + each.backward for each in settled.values())
        for row, (name, each) in enumerate(settled.items()):
            top = y + 16 + row * 30
            body.append(text(LEFT - 10, top + 16, name, anchor="end"))
            body.append(box(LEFT, top, each.saved * scale, 22, colour=COLOURS["activations"], tooltip="kept"))
            recomputed = LEFT + each.saved * scale
            body.append(
                box(recomputed, top, each.backward * scale, 22, colour=COLOURS["recompute"], tooltip="recomputed")
            )
            words = f"{each.saved / GIB:.1f} + {each.backward / GIB:.1f} GiB"
            body.append(text(recomputed + each.backward * scale + 8, top + 16, words))
    bottom = TOP + 8 + 2 * (len(settings) * 30 + 46)
    entries = [
        (COLOURS["activations"], "kept from forward to backward"),
        (COLOURS["recompute"], "of layers whose backward runs: computed again, and gradients"),
    ]
    body += legend(entries, 24, bottom - 12, apart=260)
    return document("llama3-8b, 8,192 tokens in bf16: activations of one micro-batch", body, bottom + 18)


def configure_llama(core: str, setting: dict[str, Any]) -> tuple[Any, Any]:
    """Return the configuration and one-rank layout of llama3-8b with an attention core under a recompute setting."""
    from mt_cli.run_config import load_run_config

    overrides = [f'model.attention.core="{core}"', *(f"recompute.{key}={value}" for key, value in setting.items())]
    config = load_run_config([], overrides, "llama3-8b", rules=False)
    return config, build_layout(config, 1)


def draw_precision() -> str:
    """Draw the bytes of a parameter's state."""
    kinds = {
        "bf16": PrecisionConfig(dtype="bf16"),
        "fp16": PrecisionConfig(dtype="fp16"),
        "fp32": PrecisionConfig(dtype="fp32"),
        "bf16, gradients bf16": PrecisionConfig(dtype="bf16", gradients="bf16"),
    }
    colours = {"weight": "weights", "gradient": "gradients", "wide_gradient": "buffers", "master": "master weights"}
    colours |= {"moments": "moments"}
    body: list[str] = []
    for row, (name, config) in enumerate(kinds.items()):
        each, x, y = state_bytes(config), float(LEFT), TOP + row * 40
        body.append(text(LEFT - 10, y + 18, name, anchor="end"))
        for part, colour in colours.items():
            if size := getattr(each, part):
                body.append(labelled_box(x, y, size * 36 - 2, 28, colour=COLOURS[colour], label=f"{size}"))
                x += size * 36
        unsharded = each.weight + each.gradient
        body.append(text(x + 8, y + 18, f"{unsharded + each.sharded}"))
        line = LEFT + unsharded * 36 - 1
        body.append(f'<line class="limit" x1="{line}" x2="{line}" y1="{y - 4}" y2="{y + 32}" stroke-width="2"/>')
    words = {"wide_gradient": "fp32 gradient", "weight": "weight", "gradient": "sum of gradients", "master": "master"}
    entries = [(COLOURS[colour], words.get(part, part)) for part, colour in colours.items()]
    body += legend(entries, LEFT, TOP + len(kinds) * 40 + 4, apart=150)
    bottom = TOP + len(kinds) * 40 + 44
    body.append(
        text(
            LEFT,
            bottom,
            "Right of the red line: what zero1 shares. With fsdp the masters are the weights, and it shares all 16.",
        )
    )
    return document("Bytes a parameter, with Adam", body, bottom + 18)


def draw_checkpoints(seen: list[RankMemory]) -> str:
    """Draw the way from the parts that four ranks hold to whole tensors in files."""
    shapes, rows = (
        get_model_config().canonical_shapes(),
        [name for name in seen[0].owned if not name.startswith("layers.1")],
    )
    owner = {name: rank for rank, ranks in enumerate(seen) for name in ranks.written}
    body = [text(24, TOP + 12, "canonical tensor"), text(220, TOP + 12, "who holds how much of its master")]
    body.append(text(560, TOP + 12, "the file that gets the whole"))
    for row, name in enumerate(rows):
        y = TOP + 22 + row * 26
        body.append(text(24, y + 14, name.removesuffix(".weight")))
        elements_per_rank = [ranks.owned[name] for ranks in seen]
        x, once = 220.0, sum(elements_per_rank)
        for rank, elements in enumerate(elements_per_rank):
            body.append(box(x, y, 300 * elements / once, 18, colour=RANKS[rank], tooltip=f"rank {rank}: {elements}"))
            x += 300 * elements / once
        assert once % torch.Size(shapes[name]).numel() == 0, f"{name}: some of it has more copies than the rest"
        file = f"model/{Ranks(owner[name], FOUR).prefix}-00001.safetensors"
        body += [box(560, y, 18, 18, colour=RANKS[owner[name]]), text(586, y + 14, file)]
    bottom = TOP + 34 + len(rows) * 26
    body += legend([(RANKS[rank], f"rank {rank}") for rank in range(FOUR)], 24, bottom)
    body.append(text(560, bottom + 12, f"then {META}, and last of all {COMMITTED}"))
    return document("tensor 2 × zero1 over 2 data ranks: a save gathers whole tensors", body, bottom + 32)


if __name__ == "__main__":
    for name, svg in draw_figures().items():
        (FOLDER / name).write_text(svg, encoding="utf-8")
