"""What goes wrong because of the user's input: one line that says where, what was found, what is allowed, what to do.

`mt` prints an `MtError` and exits with 2. Anything else that escapes is a bug in mt and shows a traceback.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

EXIT_USER_ERROR = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the input."""

    where: str
    """File, file:line or configuration path."""
    actual: str
    """What is wrong there."""
    allowed: str = ""
    """Values that would pass, or what to do."""

    def __str__(self) -> str:
        return f"{self.where}: {self.actual}" + (f"; {self.allowed}" if self.allowed else "")


class MtError(Exception):
    """A mistake the user can correct. `str(error)` has one line for each problem."""

    exit_code = EXIT_USER_ERROR
    """With what `mt` ends; subclasses for what is no mistake of the user's say otherwise."""

    def __init__(self, where: str, actual: str, allowed: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(where, actual, allowed),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: Iterable[Problem]) -> "MtError":
        """One error for several problems, reported together."""
        problems = tuple(problems)
        assert problems, "an error needs a problem"
        error = cls(problems[0].where, problems[0].actual, problems[0].allowed)
        error.problems = problems
        error.args = ("\n".join(map(str, problems)),)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return (MtError.from_problems, (self.problems,))  # so that it crosses from worker processes


def raise_if(problems: Iterable[Problem]) -> None:
    """Raise one `MtError` naming every problem, if there is any."""
    problems = tuple(problems)
    if problems:
        raise MtError.from_problems(problems)


def find_nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is most like `name`, whatever the case of their letters; None if none is like it."""
    by_lower_case = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1)
    return by_lower_case[near[0]] if near else None


def suggest_file(path: Path) -> str:
    """A hint for a path that does not exist: the nearest name in its folder, or the part of it that is missing."""
    if not path.parent.is_dir():
        return f"its folder {path.parent} does not exist either"
    near = find_nearest(path.name, (sibling.name for sibling in path.parent.iterdir()))
    return f"did you mean {path.with_name(near)}?" if near else f"nothing in {path.parent} has a name like it"
