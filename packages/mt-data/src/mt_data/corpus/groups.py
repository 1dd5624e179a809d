"""Groups of documents that are transitively alike, and the removal of all but the first of each."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mt_core.errors import MtError
from mt_data.corpus.records import Each, OnError, Record, read_lines, to_line
from mt_data.corpus.step import Produced, Step, run_step
from mt_data.preprocess.lines import check_inputs, read_chunks

Pair = tuple[str, str, float]


def group_duplicates(duplicates: Path, output: Path, *, threshold: float = 0.7) -> dict[str, int]:
    """Write {"number": [ids]} for each group of documents linked by pairs at least as alike as the threshold."""
    check_inputs((duplicates,))
    step = Step("group-duplicates", output, (duplicates,), {"threshold": threshold}, resumable=False)
    return run_step(step, [duplicates], partial(_grouped, threshold))


def _grouped(threshold: float, duplicates: Path) -> Produced:
    pairs = ((a, b) for a, b, likeness in read_pairs(duplicates) if likeness >= threshold)
    found = groups(pairs)
    data = b"".join(to_line({str(number): members}) for number, members in enumerate(found))
    return Produced(data, Counter({"groups": len(found), "documents": sum(map(len, found))}))


def read_pairs(path: Path) -> Iterator[Pair]:
    """Pairs of a file that `find_duplicates` wrote."""
    for number, line in _numbered(path):
        try:
            ((main, others),) = json.loads(line).items()
            yield from ((main, other, float(likeness)) for entry in others for other, likeness in entry.items())
        except (ValueError, AttributeError, TypeError) as err:
            raise MtError(f"{path}:{number}", f"is no line of duplicates ({err})", '{"id": [{"id": 0.9}]}') from None


def groups(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Connected sets of more than one, and their members, in the order in which they first occur."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name

    for a, b in pairs:
        first, second = root(a), root(b)
        parent[second] = first
    members: dict[str, list[str]] = {}
    for name in parent:
        members.setdefault(root(name), []).append(name)
    return [group for group in members.values() if len(group) > 1]


def remove_duplicates(
    inputs: Sequence[Path], grouped: Path, output: Path, *, id_key: str = "url", on_error: OnError = "stop"
) -> dict[str, int]:
    """Write the records without those that stand behind the first in a group."""
    check_inputs((*inputs, grouped))
    removed = frozenset(read_removed(grouped))
    step = Step("remove-duplicates", output, (*inputs, grouped), {"id_key": id_key, "on_error": on_error})
    return run_step(step, read_lines(inputs), Each(partial(_unless_removed, removed, id_key), (id_key,), on_error))


def _unless_removed(removed: frozenset[str], id_key: str, record: Record, number: int) -> tuple[list[Record], str]:
    return ([], "duplicates") if record[id_key] in removed else ([record], "kept")


def read_removed(path: Path) -> Iterator[str]:
    """Ids that leave: of each group all but the first."""
    for number, line in _numbered(path):
        try:
            ((_, members),) = json.loads(line).items()
            yield from members[1:]
        except (ValueError, AttributeError, TypeError) as err:
            raise MtError(f"{path}:{number}", f"is no group ({err})", '{"0": ["id", "id"]}') from None


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    for chunk in read_chunks(path):
        yield from enumerate(chunk.lines, start=chunk.first)
