"""Several checkpoints read side by side, in whatever order each of them gives its tensors."""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor


def align_streams(streams: Sequence[Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """Each name with its tensor from every stream, None where a stream has none; those come last.

    A tensor whose mates have not come waits in its memory map, unread, so one name at a time is in memory.
    """
    running = dict(enumerate(map(iter, streams)))
    waiting: dict[str, dict[int, Tensor]] = {}
    while running:
        for number, stream in list(running.items()):
            if (pair := next(stream, None)) is None:
                del running[number]
                continue
            name, tensor = pair
            waiting.setdefault(name, {})[number] = tensor
            if len(waiting[name]) == len(streams):
                tensors = waiting.pop(name)
                yield name, tuple(tensors[i] for i in range(len(streams)))
    for name, tensors in waiting.items():
        yield name, tuple(tensors.get(i) for i in range(len(streams)))
