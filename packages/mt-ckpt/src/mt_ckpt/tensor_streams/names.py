"""Two-way renaming of tensors from one table. `{n}` stands for a layer number, `{e}` for an expert's within it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

NUMBER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Names:
    """A table from another format's tensor names to ours, usable in both directions."""

    table: Mapping[str, str]
    """Their name to our canonical name."""
    ignore: tuple[str, ...] = ()
    """Patterns of their names that carry no weights, such as buffers of old exports."""
    also: Mapping[str, str] = field(default_factory=dict)
    """Further names of theirs, read but never written."""

    def __post_init__(self) -> None:
        first: dict[str, str] = {}
        for theirs, ours in self.table.items():
            if first.setdefault(ours, theirs) != theirs:
                raise ValueError(f"both {first[ours]} and {theirs} map to {ours}")

    def ours(self, name: str) -> str | None:
        """Our name for theirs, or None when the table does not know it."""
        return _rename({**self.also, **self.table}, name)

    def theirs(self, name: str) -> str | None:
        """Their name for ours, or None when the table does not know it."""
        return _rename({ours: theirs for theirs, ours in self.table.items()}, name)

    def ignored(self, name: str) -> bool:
        """Whether one of their tensors is left out on purpose."""
        return any(re.search(pattern, name) for pattern in self.ignore)

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Their names that the table lacks, in order, so that all of them can be reported at once."""
        return [name for name in names if self.ours(name) is None and not self.ignored(name)]


def _rename(table: Mapping[str, str], name: str) -> str | None:
    """A name by the table: its first two numbers stand for `{n}` and `{e}`, or the first for `{n}`, or none does."""
    numbers = NUMBER.findall(name)[:2]
    for count in range(len(numbers), -1, -1):
        holes = dict(zip(("{n}", "{e}"), numbers[:count], strict=False))
        key = name
        for hole, number in holes.items():
            key = key.replace(f".{number}.", f".{hole}.", 1)
        if (target := table.get(key)) is not None:
            for hole, number in holes.items():
                target = target.replace(hole, number)
            return target
    return None
