"""Groups of documents that are transitively alike, and the removal of all but the first of each."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from mt_core.errors import MtError
from mt_data.corpus.records import OnError, Record, RecordTransform, read_lines, to_line
from mt_data.corpus.step import CorpusStep, StepOutput, run_step
from mt_data.text_io.lines import LineChunk, check_inputs, read_chunks

SimilarPair = tuple[str, str, float]
GROUPS_PER_ITEM = 4096


def group_duplicates(duplicates: Path, output: Path, *, threshold: float = 0.7) -> dict[str, int]:
    """Write {"number": [ids]} for each group of documents linked by pairs at least as alike as the threshold.

    First `OUTPUT.links` gets the pairs that join two groups, from which a run that was stopped knows the groups again.
    """
    check_inputs((duplicates,))
    links, options, forest = output.with_name(f"{output.name}.links"), {"threshold": threshold}, DocumentForest()
    step = CorpusStep("links", links, (duplicates,), options)
    run_step(step, read_chunks(duplicates), partial(_link_pairs, forest, threshold), recall=forest.recall)
    if not forest.parent:  # they were found by an earlier run
        for _, line in _number_lines(links):
            forest.recall(line)
    groups = forest.groups()
    starts = range(0, len(groups), GROUPS_PER_ITEM)
    return run_step(
        CorpusStep("group-duplicates", output, (duplicates,), options), starts, partial(_write_groups, groups)
    )


class DocumentForest:
    """Sets of documents that are linked, as trees; `parent` keeps the order in which they first occur."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def link(self, a: str, b: str) -> bool:
        """Join the sets of two documents; whether they were two."""
        first, second = self._find_root(a), self._find_root(b)
        self.parent[second] = first
        return first != second

    def recall(self, line: bytes) -> None:
        """Link the two of a line of the file of links."""
        self.link(*json.loads(line))

    def groups(self) -> list[list[str]]:
        """Sets of more than one, and their members, in the order in which they first occur."""
        members: dict[str, list[str]] = {}
        for name in self.parent:
            members.setdefault(self._find_root(name), []).append(name)
        return [group for group in members.values() if len(group) > 1]

    def _find_root(self, name: str) -> str:
        parent = self.parent
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name


def _link_pairs(forest: DocumentForest, threshold: float, chunk: LineChunk) -> StepOutput:
    links = [(a, b) for a, b, likeness in _parse_pairs(chunk) if likeness >= threshold and forest.link(a, b)]
    return StepOutput(b"".join(map(to_line, links)), Counter(links=len(links)))


def _write_groups(groups: Sequence[list[str]], start: int) -> StepOutput:
    """Some of the groups from a number on."""
    some = groups[start : start + GROUPS_PER_ITEM]
    data = b"".join(to_line({str(number): members}) for number, members in enumerate(some, start))
    return StepOutput(data, Counter(groups=len(some), documents=sum(map(len, some))))


def _parse_pairs(chunk: LineChunk) -> Iterator[SimilarPair]:
    """Pairs of some lines that `find_duplicates` wrote."""
    for number, line in enumerate(chunk.lines, start=chunk.first):
        try:
            ((main, others),) = json.loads(line).items()
            yield from ((main, other, float(likeness)) for entry in others for other, likeness in entry.items())
        except (ValueError, AttributeError, TypeError) as err:
            where = f"{chunk.path}:{number}"
            raise MtError(where, f"is no line of duplicates ({err})", '{"id": [{"id": 0.9}]}') from None


def remove_duplicates(
    inputs: Sequence[Path], grouped: Path, output: Path, *, id_key: str = "url", on_error: OnError = "stop"
) -> dict[str, int]:
    """Write the records without those that stand behind the first in a group."""
    check_inputs((*inputs, grouped))
    removed = frozenset(read_removed_ids(grouped))
    step = CorpusStep("remove-duplicates", output, (*inputs, grouped), {"id_key": id_key, "on_error": on_error})
    return run_step(
        step, read_lines(inputs), RecordTransform(partial(_drop_removed, removed, id_key), (id_key,), on_error)
    )


def _drop_removed(removed: frozenset[str], id_key: str, record: Record, number: int) -> tuple[list[Record], str]:
    return ([], "duplicates") if record[id_key] in removed else ([record], "kept")


def read_removed_ids(path: Path) -> Iterator[str]:
    """Ids that leave: of each group all but the first."""
    for number, line in _number_lines(path):
        try:
            ((_, members),) = json.loads(line).items()
            yield from members[1:]
        except (ValueError, AttributeError, TypeError) as err:
            raise MtError(f"{path}:{number}", f"is no group ({err})", '{"0": ["id", "id"]}') from None


def _number_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for chunk in read_chunks(path):
        yield from enumerate(chunk.lines, start=chunk.first)
