"""Predictions of several runs as one: the mean of their probabilities, or numbers, and a threshold if there is one.

Source: docs/specs/evaluation.md §3.4.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mt_core.errors import MtError, Problem, raise_if
from mt_core.files import atomic_directory
from mt_eval.finetuning.predictions import FOLDER, Prediction, read_predictions, write_predictions, write_summary

MOST_PROBLEMS = 5
"""Examples that are named, of those in which two files differ."""


def find_files(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The files of each set, one of every run; a path is a run, a folder of predictions, or a file of its own set."""
    if len(paths) < 2:
        raise MtError("mt task ensemble", f"{len(paths)} runs", "two or more")
    sets = [_list_sets(path) for path in paths]
    raise_if(
        Problem(str(path), f"has predictions of {', '.join(each)}", f"those of {', '.join(sets[0])}, as {paths[0]}")
        for path, each in zip(paths, sets, strict=True)
        if each.keys() != sets[0].keys()
    )
    return {name: [each[name] for each in sets] for name in sets[0]}


def _list_sets(path: Path) -> dict[str, Path]:
    if path.is_file():
        return {"ensemble": path}
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    files = {file.stem: file for file in sorted(folder.glob("*.jsonl")) if file.name != "metrics.jsonl"}
    if not files:
        raise MtError(str(path), "holds no predictions", "a run of mt task that has ended, or a .jsonl file of one")
    return files


def average(files: Sequence[Path]) -> list[Prediction]:
    """Each example's mean probabilities over files, which must have the same examples, labels and classes, in one
    order."""
    members = [read_predictions(file) for file in files]
    for file, member in zip(files, members, strict=True):
        problems = [*_differences(file, member, files[0], members[0])]
        raise_if(problems[:MOST_PROBLEMS])
    return [
        Prediction(
            rows[0].uid,
            rows[0].label,
            {name: sum(row.scores[name] for row in rows) / len(rows) for name in rows[0].scores},
        )
        for rows in zip(*members, strict=True)
    ]


def _differences(
    file: Path, member: Sequence[Prediction], first_file: Path, first: Sequence[Prediction]
) -> Iterator[Problem]:
    """Where a file has other examples than the first."""
    allowed = f"those of {first_file}, in the same order"
    if len(member) != len(first):
        yield Problem(str(file), f"{len(member)} examples, {first_file} has {len(first)}", allowed)
        return
    for number, (row, expected) in enumerate(zip(member, first, strict=True), 1):
        for name in ("uid", "label"):
            if (value := getattr(row, name)) != getattr(expected, name):
                yield Problem(f"{file}:{number}", f"{name} {value!r}, not {getattr(expected, name)!r}", allowed)
        if row.scores.keys() != expected.scores.keys():
            yield Problem(f"{file}:{number}", f"classes {', '.join(row.scores)}", f"{', '.join(expected.scores)}")


def choose_threshold(
    sets: Mapping[str, Sequence[Prediction]], names: Sequence[str], given: float | None = None
) -> float:
    """The threshold, 0.00 to 0.99 in hundredths, with the most right predictions on the sets of these names.

    Of several that are as good it is the one nearest to 0.5, of two of those the lower.
    """
    problems = [Problem("--tune-threshold", f"no set {name!r}", ", ".join(sets)) for name in names if name not in sets]
    if given is not None:
        problems.append(Problem("--threshold", f"{given}, together with --tune-threshold", "one of the two"))
    raise_if(problems)
    labelled = [each for name in names for each in sets[name] if each.label is not None]
    _check_two_classes([*sets[names[0]], *labelled])
    if not labelled:
        raise MtError("--tune-threshold", f"no example of {', '.join(names)} has a label", "sets with labels")
    correct = dict[float, int]()
    for threshold in (hundredths / 100 for hundredths in range(100)):
        correct[threshold] = sum(replace(each, threshold=threshold).prediction == each.label for each in labelled)
    most = max(correct.values())
    return min((t for t, right in correct.items() if right == most), key=lambda t: (abs(t - 0.5), t))


def apply_threshold(sets: Mapping[str, Sequence[Prediction]], threshold: float) -> dict[str, list[Prediction]]:
    """The predictions that a threshold makes of the same probabilities."""
    _check_two_classes([each for predictions in sets.values() for each in predictions])
    return {name: [replace(each, threshold=threshold) for each in predictions] for name, predictions in sets.items()}


def _check_two_classes(predictions: Sequence[Prediction]) -> None:
    if wrong := next((each for each in predictions if len(each.scores) != 2), None):
        raise MtError("threshold", f"the classes are {', '.join(wrong.scores)}", "a task of two classes")


def write_ensemble(sets: Mapping[str, Sequence[Prediction]], directory: Path) -> None:
    """Write a file for each set and a summary to a new directory, all of them or none."""
    with atomic_directory(directory) as temporary:
        for name, predictions in sets.items():
            write_predictions(temporary / f"{name}.jsonl", predictions)
        write_summary(temporary, sets)
