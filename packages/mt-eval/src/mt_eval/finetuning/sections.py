"""The data sections of tasks, `data.kind = "glue"` and `"race"`, and the datasets that they describe.

Imports neither torch nor numpy, as this module is read with every configuration.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from pydantic import PositiveInt

from mt_core.contracts import ModelConfig
from mt_core.errors import MtError, Problem
from mt_data.config import DataConfig
from mt_eval.finetuning import glue, race
from mt_eval.finetuning.examples import EncodedExamples, EpochOrder, Example, Lengths, name_sets, raise_problems
from mt_models.config import BertConfig

if TYPE_CHECKING:
    from mt_data.blending.build import Splits, SplitSizes

GLUETask = Literal["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst-2", "sts-b", "wnli"]


class TaskData(DataConfig):
    """Labelled texts for a model with a task's head; mt task writes such sections."""

    order_is_fixed: ClassVar[bool] = True
    """Whether asking for more samples leaves the order of those before as it is."""
    train_paths: tuple[str, ...]
    """Training files, or folders of RACE."""
    valid_paths: tuple[str, ...] = ()
    """Validation files, or folders, each evaluated whole, apart and with the others."""
    epoch_samples: PositiveInt
    """Samples of an epoch, at most those of all training files; every epoch shuffles them anew."""
    skip_bad_rows: bool = False
    """Leave out examples that cannot be read, with a count on stderr, instead of refusing the files."""


class GLUEData(TaskData):
    """A text, or a pair of texts, and a class or a number."""

    kind: Literal["glue"] = "glue"
    task: GLUETask
    """Whose files they are; it decides columns and classes."""


class RACEData(TaskData):
    """A passage, a question and four options."""

    kind: Literal["race"] = "race"
    max_qa_length: PositiveInt = 128
    """Most tokens of question and option; the passage has the rest of a sample."""


TaskSection = GLUEData | RACEData
"""The data section of any task."""


def get_classes(data: TaskSection) -> list[str]:
    """The classes of a task's samples as files spell them, in the order of their numbers; none if they are numbers."""
    return glue.list_classes(data.task) if isinstance(data, GLUEData) else list(race.LETTERS)


def make_task_head(data: TaskSection) -> dict[str, Any]:
    """The head that a model needs for a task."""
    if isinstance(data, RACEData):
        return {"kind": "multiple_choice"}
    classes = get_classes(data)
    return {"kind": "classification", "classes": len(classes)} if classes else {"kind": "regression"}


def read_examples(
    data: TaskSection, paths: Sequence[str], *, labelled: bool = True
) -> tuple[list[Example], list[Problem]]:
    """The examples of files or folders, and everything that is wrong with them."""
    examples, problems = list[Example](), list[Problem]()
    for path in map(Path, paths):
        read = (
            glue.read_file(path, data.task, labelled=labelled)
            if isinstance(data, GLUEData)
            else (race.read_folder(path, labelled=labelled))
        )
        for item in read:
            examples.append(item) if isinstance(item, Example) else problems.append(item)
    return examples, problems


@dataclass(frozen=True, slots=True)
class TaskSets:
    """The examples of a run."""

    train: Sequence[Example]
    valid: Mapping[str, Sequence[Example]]
    """Those of each validation set, by its name."""
    skipped: Sequence[Problem]
    """What was wrong with those that were left out."""


def load_sets(data: TaskSection) -> TaskSets:
    """Training and validation examples; one error has all problems of all files.

    With `skip_bad_rows` examples that have some are left out, unless that leaves a set without any.
    """
    train, problems = read_examples(data, data.train_paths)
    empty = [] if train else problems
    valid = dict[str, list[Example]]()
    for name, path in zip(name_sets(data.valid_paths), data.valid_paths, strict=True):
        valid[name], more = read_examples(data, [path])
        empty = empty if valid[name] else [*empty, *more]
        problems = [*problems, *more]
    raise_problems(empty if data.skip_bad_rows else problems)
    return TaskSets(train, valid, problems)


def read_tests(data: TaskSection, paths: Sequence[str]) -> dict[str, list[Example]]:
    """The examples of test sets by name, which need no labels; every line counts, so none is left out."""
    names = name_sets([*data.valid_paths, *paths])[len(data.valid_paths) :]
    tests, problems = dict[str, list[Example]](), list[Problem]()
    for name, path in zip(names, paths, strict=True):
        tests[name], more = read_examples(data, [path], labelled=False)
        problems += more
    raise_problems(problems)
    return tests


def make_lengths(data: TaskSection) -> Lengths:
    """Where the texts of a task are cut off."""
    return Lengths(data.seq_length, data.max_qa_length if isinstance(data, RACEData) else None)


def _build(config: TaskSection, samples: Sequence[object], seed: int) -> "Splits":
    from mt_data.blending.build import Splits
    from mt_data.blending.extension import get_last
    from mt_data.tokenizers import build_tokenizer

    assert config.tokenizer is not None, "rules ask for one"
    tokenizer: Any = build_tokenizer(config.tokenizer)
    sets = load_sets(config)
    lengths, wanted = make_lengths(config), get_last(cast("SplitSizes", samples)[0]) or 0
    encoded = EncodedExamples(sets.train, tokenizer, lengths)
    if config.epoch_samples > len(encoded):
        actual = f"{config.epoch_samples}, but there are {len(encoded)} training examples"
        raise MtError("data.epoch_samples", actual, f"at most {len(encoded)}")
    order = EpochOrder(encoded, epoch_samples=config.epoch_samples, length=wanted, seed=seed)
    valid = sets.valid if samples[1] else {}
    valid_sets = {name: EncodedExamples(each, tokenizer, lengths) for name, each in valid.items()}
    return Splits(order, None, None, valid_sets=valid_sets)


def build_glue(
    config: GLUEData, *, samples: Sequence[object], seed: int, cache_dir: Path, builder: bool = True
) -> object:
    """The `Splits` of a task of GLUE for these `SplitSizes`; nothing is cached."""
    return _build(config, samples, seed)


def build_race(
    config: RACEData, *, samples: Sequence[object], seed: int, cache_dir: Path, builder: bool = True
) -> object:
    """The `Splits` of RACE for these `SplitSizes`; nothing is cached."""
    return _build(config, samples, seed)


def list_problems(data: TaskSection, model: ModelConfig) -> Iterator[Problem]:
    """What is wrong between a task's data and the model, and in the data itself."""
    if data.tokenizer is None:
        yield Problem("data.tokenizer", "is not given", "the checkpoint's tokenizer, or another of the same vocabulary")
    for field in ("train_paths", "valid_paths"):
        for path in getattr(data, field):
            if not Path(path).exists():
                yield Problem(f"data.{field}", f"no file or folder {path}", "check the path")
    if not data.train_paths:
        yield Problem("data.train_paths", "is empty", "at least one file or folder")
    if isinstance(data, RACEData) and data.max_qa_length > data.seq_length - 4:
        actual = f"{data.max_qa_length} leaves no room for the passage in data.seq_length = {data.seq_length}"
        yield Problem("data.max_qa_length", actual, f"allowed: at most {data.seq_length - 4}")
    head, wanted = getattr(model, "task_head", None), make_task_head(data)
    if head is None or head.model_dump() != wanted:
        actual = "none" if head is None else str(head.model_dump())
        yield Problem(
            "model.task_head", f"{actual}, but samples of data.kind = {data.kind!r} need {wanted}", "as mt task"
        )
    elif isinstance(model, BertConfig) and model.token_types == 1:
        yield Problem(
            "model.token_types", "1, but pairs of texts have tokens of two types", "allowed: 0, or 2 and more"
        )
