"""The run that fine-tunes a checkpoint for a task, as a configuration of mt train: RUN/task.toml.

All of the training is that of mt train: layouts, resumption, evaluations and checkpoints. Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from mt_core.contracts import ModelConfig
from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_eval.finetuning.sections import GLUEData, RACEData, TaskSection, TaskSets, make_task_head
from mt_models.config import BertConfig

if TYPE_CHECKING:
    from mt_data.config import TokenizerConfig

RUN_FILE = "task.toml"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a fine-tuning run that tasks differ in."""

    epochs: int
    micro_batch: int
    global_batch: int
    lr: float
    warmup_fraction: float
    seq_length: int
    weight_decay: float = 0.1


SMALL = Recipe(epochs=3, micro_batch=8, global_batch=32, lr=2e-5, warmup_fraction=0.06, seq_length=128)
RECIPES: Mapping[str, Recipe] = {
    "race": Recipe(epochs=3, micro_batch=4, global_batch=32, lr=1e-5, warmup_fraction=0.06, seq_length=512),
    "mnli": Recipe(epochs=5, micro_batch=8, global_batch=128, lr=5e-5, warmup_fraction=0.065, seq_length=128),
    "qqp": Recipe(epochs=12, micro_batch=8, global_batch=128, lr=5e-5, warmup_fraction=0.065, seq_length=128),
}
"""Megatron's published settings, where it publishes some; the other tasks of GLUE have `SMALL`."""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that a run begins with."""

    loader: str
    path: Path
    options: Mapping[str, Any]
    model: ModelConfig
    tokenizer: "TokenizerConfig | None" = None
    """Another source of its vocabulary."""


@dataclass(frozen=True, slots=True)
class Files:
    """What a run trains on and is evaluated on."""

    train: Sequence[Path]
    valid: Sequence[Path]
    skip_bad_rows: bool = False


def check_model(model: ModelConfig, where: Path) -> BertConfig:
    """The model if it is a BERT; else an `MtError`."""
    if not isinstance(model, BertConfig):
        raise MtError(str(where), f"holds a model of kind {model.kind!r}", "a BERT, in any format that a loader reads")
    return model


def make_data(task: str, files: Files, recipe: Recipe, max_qa_length: int | None = None) -> TaskSection:
    """The data section of a task."""
    common: dict[str, Any] = {
        "seq_length": recipe.seq_length,
        "train_paths": [str(path) for path in files.train],
        "valid_paths": [str(path) for path in files.valid],
        "skip_bad_rows": files.skip_bad_rows,
        "epoch_samples": recipe.global_batch,
    }
    if task == "race":
        return RACEData.model_validate(common | ({} if max_qa_length is None else {"max_qa_length": max_qa_length}))
    return GLUEData.model_validate(common | {"task": task})


def make_run(
    source: Source, data: TaskSection, sets: TaskSets, recipe: Recipe, *, run_dir: Path, seed: int
) -> dict[str, Any]:
    """The configuration: an epoch of as many whole batches as the files fill, then an evaluation and a checkpoint."""
    steps = len(sets.train) // recipe.global_batch
    if not steps:
        actual = f"{len(sets.train)} examples fill no batch of {recipe.global_batch}"
        raise MtError("--train-data", actual, f"--global-batch-size of at most {len(sets.train)}")
    largest = max(map(len, sets.valid.values()), default=0)
    section = data.model_copy(update={"epoch_samples": steps * recipe.global_batch})
    values = section.model_dump(mode="json", exclude_defaults=True) | {"kind": data.kind, "seq_length": data.seq_length}
    if source.tokenizer:
        values["tokenizer"] = source.tokenizer.model_dump(mode="json", exclude_none=True)
    heads = {"lm_head": False, "pooler": True, "binary_head": False, "task_head": make_task_head(data)}
    return {
        "model": {"kind": "bert", **heads},
        "data": values,
        "batch": {"micro_batch": recipe.micro_batch, "global_batch": recipe.global_batch},
        "optim": {"lr": recipe.lr, "beta2": 0.999, "weight_decay": recipe.weight_decay},
        "train": {
            "steps": recipe.epochs * steps,
            "eval_every": steps if sets.valid else 0,
            "eval_batches": max(1, ceil(largest / recipe.global_batch)),
        },
        "lr_schedule": {"decay": "linear", "warmup_fraction": recipe.warmup_fraction},
        "checkpoint": {
            "init": f"{source.loader}:{source.path}",
            "init_options": dict(source.options),
            "every": steps,
        },
        "runtime": {"run_dir": str(run_dir), "seed": seed},
    }


def write_run(run_dir: Path, values: Mapping[str, Any]) -> Path:
    """Write RUN/task.toml, whole or not at all, and return its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(run_dir / RUN_FILE, "w") as file:
        file.write(tomli_w.dumps(dict(values)))
    return run_dir / RUN_FILE
