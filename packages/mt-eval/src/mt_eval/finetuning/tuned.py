"""A checkpoint that is tuned for a task already: which task, which class each logit is, and what it says of files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import did_you_mean
from mt_eval.finetuning.examples import EncodedExamples
from mt_eval.finetuning.predictions import Prediction, predict
from mt_eval.finetuning.recipe import check_model
from mt_eval.finetuning.sections import (
    GLUEData,
    GLUETask,
    RACEData,
    TaskSection,
    get_classes,
    make_lengths,
    make_task_head,
    read_tests,
)
from mt_eval.load import Checkpoint, load_network, load_tokenizer

if TYPE_CHECKING:
    from mt_data.config import TokenizerConfig
    from mt_data.tokenizers.base import MaskingTokenizer
    from mt_eval.options import ModelOptions
    from mt_models.config import BertConfig

TASKS = ("race", *get_args(GLUETask))


@dataclass(frozen=True, slots=True)
class TunedTask:
    """What a checkpoint was tuned for."""

    data: TaskSection
    classes: Sequence[str]
    """The classes in the order of the head's logits; none if it gives a number."""


def find_task(
    checkpoint: Checkpoint,
    task: str | None,
    classes: Sequence[str] | None,
    *,
    seq_length: int | None = None,
    max_qa_length: int | None = None,
) -> TunedTask:
    """The task of a run of mt task, or the one that is named, whose classes have to be named then too.

    Nothing in another checkpoint says for sure which class a logit is, so that is never guessed.
    """
    model = check_model(checkpoint.loader.config(), checkpoint.path)
    made = _read_run(checkpoint)
    if task is not None and task.lower() not in TASKS:
        raise MtError("--task-name", f"unknown task {task!r}", did_you_mean(task, TASKS))
    if made is None and task is None:
        raise MtError(str(checkpoint.path), "is no run of mt task", f"--task-name, one of {', '.join(TASKS)}")
    name = (task or (made.task if isinstance(made, GLUEData) else "race")).lower()
    is_own = made is not None and name == (made.task if isinstance(made, GLUEData) else "race")
    section = made if made is not None and is_own else _make_section(name, model.max_seq_len)
    changes = {"seq_length": seq_length, "max_qa_length": max_qa_length if name == "race" else None}
    section = section.model_copy(update={key: value for key, value in changes.items() if value is not None})
    if max_qa_length is not None and name != "race":
        raise MtError("--max-qa-length", f"{max_qa_length}, but the task is {name}", "leave it out")
    ours = get_classes(section)
    raise_if(_find_problems(model, section))
    if classes is None and not is_own and len(ours) > 1 and name != "race":
        actual = f"which of {', '.join(ours)} each logit is, its files do not say for sure"
        raise MtError(str(checkpoint.path), actual, f"--classes in the order of its logits, such as {' '.join(ours)}")
    if classes is not None and (name == "race" or sorted(classes) != sorted(ours)):
        ours = () if name == "race" else ours
        raise MtError("--classes", " ".join(classes), f"these in the order of the logits: {' '.join(ours) or 'none'}")
    return TunedTask(section, classes or ours)


def _read_run(checkpoint: Checkpoint) -> TaskSection | None:
    """The data section of a run of mt task; None for any other checkpoint."""
    from mt_core.checkpoint.native import read_meta

    step = getattr(checkpoint.loader, "step", None)
    data: Mapping[str, Any] = read_meta(step)["config"].get("data", {}) if step else {}
    kinds: Mapping[str, type[TaskSection]] = {"glue": GLUEData, "race": RACEData}
    kind = kinds.get(str(data.get("kind")))
    return kind.model_validate(data) if kind else None


def _make_section(task: str, seq_length: int) -> TaskSection:
    common: dict[str, Any] = {"train_paths": (), "seq_length": seq_length, "epoch_samples": 1}
    return RACEData(**common) if task == "race" else GLUEData(**common, task=cast(GLUETask, task))


def _find_problems(model: "BertConfig", data: TaskSection) -> list[Problem]:
    problems, wanted = [], make_task_head(data)
    head = None if model.task_head is None else model.task_head.model_dump()
    if head != wanted:
        actual = "has no head for a task" if head is None else f"has the head {head}"
        problems.append(Problem("checkpoint", actual, f"the task needs {wanted}: fine-tune it first, with mt task"))
    if data.seq_length > model.max_seq_len:
        problems.append(Problem("--seq-length", f"{data.seq_length}", f"at most {model.max_seq_len}, its positions"))
    if isinstance(data, RACEData) and data.max_qa_length > data.seq_length - 4:
        actual = f"{data.max_qa_length} leaves no room for the passage in {data.seq_length} tokens"
        problems.append(Problem("--max-qa-length", actual, f"at most {data.seq_length - 4}"))
    return problems


def predict_files(
    checkpoint: Checkpoint,
    task: TunedTask,
    files: Sequence[Path],
    *,
    model: "ModelOptions",
    tokenizer: "TokenizerConfig | None",
    batch_size: int,
) -> dict[str, list[Prediction]]:
    """The predictions of each file, by the name of its set; labels are compared where there are some."""
    from mt_core.distributed.process_group import pick_device

    data = task.data.model_copy(update={"valid_paths": ()})
    sets = read_tests(data, [str(path) for path in files])
    words = cast("MaskingTokenizer", load_tokenizer(checkpoint, tokenizer))
    network = load_network(checkpoint, device=model.device, dtype=model.dtype)
    device = pick_device(model.device, where="--device")
    encoded = {name: EncodedExamples(examples, words, make_lengths(data)) for name, examples in sets.items()}
    return {
        name: predict(network, samples, task.classes, labels=get_classes(data), batch_size=batch_size, device=device)
        for name, samples in encoded.items()
    }


def check_new(directory: Path) -> None:
    """Refuse, before the work is done, a directory that is there."""
    if directory.exists():
        raise MtError("--save-dir", f"{directory} exists", "choose another directory or remove it")
