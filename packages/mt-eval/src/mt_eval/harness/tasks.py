"""Tasks of lm-evaluation-harness by name, path or pattern, and what is wrong with those that cannot run here.

Finding all 14,000 that lm-eval brings takes seconds, so they are looked through only for names that are not of the
reader's own folders.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mt_core.errors import MtError, Problem, find_nearest, raise_if
from mt_eval.harness.texts import TextOptions

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

SEED = 1234
"""Seed of few-shot examples and of drawn texts: that of lm-evaluation-harness."""
NETWORK = "connect this machine once, after which the data is kept in Hugging Face's cache; or use files of your own"


def load_tasks(names: Sequence[str], include: Sequence[Path], *, seq_length: int) -> "TaskDict":
    """Tasks and groups of these names, patterns and YAML files, as lm-evaluation-harness takes them, their data loaded.

    All that is wrong is one `MtError`: unknown names, data that is missing, and tasks that a model of text with inputs
    of `seq_length` tokens cannot do.
    """
    raise_if(
        Problem("--include-path", f"{folder} is not a folder", "a folder of task files, NAME.yaml")
        for folder in include
        if not folder.is_dir()
    )
    manager, specs = _find(names, include)
    loaded: list[Task | Group] = []
    problems: list[Problem] = []
    for spec in specs:
        try:
            read = manager.load([spec])
        except Exception as err:  # lm-eval and datasets raise anything, for what a task file says or the network
            problems.append(_explain(spec, err))
        else:
            nested = {name for children in read.get("group_map", {}).values() for name in children}
            groups = [group for name, group in read.get("groups", {}).items() if name not in nested]
            loaded += groups or read["tasks"].values()
            problems += [problem for task in read["tasks"].values() for problem in _check(task, seq_length)]
    raise_if(problems)
    try:
        return manager.load(loaded)
    except ValueError as err:  # a task that is asked for twice, as when its group is too
        raise MtError("--tasks", str(err), "ask for each task once, by its name or by its group's") from err


def set_num_fewshot(tasks: "Iterable[Task]", asked: int | None) -> None:
    """Give each task its number of solved examples: what is asked for, but none to a task that says it has none."""
    for task in tasks:
        default = task.get_config("num_fewshot")
        if default is None or (asked is not None and default != 0):
            task.set_config(key="num_fewshot", value=asked or 0)
        task.set_fewshot_seed(seed=SEED)


def _find(names: Sequence[str], include: Sequence[Path]) -> tuple["TaskManager", list[str]]:
    """The smallest manager that knows all names, and what the patterns among them match."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=list(include), include_defaults=False)
    if not all(_is_file(name) or name in manager.all_subtasks for name in names):
        manager = TaskManager(include_path=list(include))
    specs, problems = [], []
    for name in names:
        matched = [name] if _is_file(name) else manager.match_tasks([name])
        specs += matched
        if not matched:
            near = find_nearest(name, manager.all_tasks)
            allowed = f"did you mean {near!r}? " if near else ""
            allowed += "`lm-eval ls tasks` lists all; --include-path names a folder of your own"
            problems.append(Problem("--tasks", f"{name!r} is unknown", allowed))
    raise_if(problems)
    return manager, list(dict.fromkeys(specs))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _explain(name: str, err: Exception) -> Problem:
    """Why a task cannot be loaded, in one line."""
    text = " ".join(str(err).split()) or "no reason given"
    where = f"--tasks: {name}"
    if isinstance(err, ImportError):
        return Problem(where, f"needs a library that is not installed ({text})", f"pip install {err.name or 'it'}")
    if isinstance(err, MtError):
        return err.problems[0]
    allowed = NETWORK if isinstance(err, OSError) else "check the task's YAML file"
    return Problem(where, f"cannot be loaded ({type(err).__name__}: {text})", allowed)


def _check(task: "Task", seq_length: int) -> Iterator[Problem]:
    """Why a task that is loaded cannot be run."""
    where = f"--tasks: {task.config.task}"
    if getattr(task, "MULTIMODAL", False):
        yield Problem(where, "asks about images or sound", "a task on text")
    if getattr(task, "UNSAFE_CODE", False):
        yield Problem(where, "runs code that the model writes", "run it with lm-eval itself, in a sandbox")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            TextOptions.parse(task.config.generation_kwargs or {}, where).check(seq_length, where)
        except MtError as err:
            yield from err.problems
