"""Which pipeline stage holds which layers: evenly cut, or with other numbers on the first and last.

Source: docs/specs/checkpoints.md §3.10.
"""


def stage_layers(layers: int, stages: int, chunks: int = 1) -> tuple[int, ...] | None:
    """Layers of each stage, which its chunks share evenly; None if Megatron has no arguments for any such cut.

    Uneven cuts give the first and last stage less than the rest, for they also hold the embedding and the output layer.
    """
    units, rest = divmod(layers, chunks)
    if rest or units < stages:
        return None
    each = -(-units // stages)
    if stages > 1 and units - each * (stages - 2) < 2:
        each = units // stages
    ends = units - each * (stages - 2)
    counts = (units,) if stages == 1 else (ends // 2, *[each] * (stages - 2), ends - ends // 2)
    return tuple(count * chunks for count in counts)


def layer_locations(layers: int, stages: int, chunks: int = 1) -> list[tuple[int, int, int]]:
    """Stage, chunk and local number of each layer: first chunks of all stages, then second chunks, and so on."""
    counts = stage_layers(layers, stages, chunks)
    assert counts, (layers, stages, chunks)
    return [
        (stage, chunk, local)
        for chunk in range(chunks)
        for stage, count in enumerate(counts)
        for local in range(count // chunks)
    ]


def fitting_stages(layers: int, chunks: int = 1) -> list[int]:
    """Every number of stages that the layers can be cut for."""
    return [stages for stages in range(1, layers + 1) if stage_layers(layers, stages, chunks)]
