"""The run that trains a model further on its own least toxic texts: a configuration that mt train runs on a text.

Torch-free. Source: docs/specs/evaluation.md §5.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from mt_core.errors import MtError
from mt_core.files import atomic_file
from mt_data.text_io.inputs import guess_format
from mt_data.text_io.texts import check_file
from mt_models.config import GPTConfig

if TYPE_CHECKING:
    from mt_data.config import TokenizerConfig
    from mt_eval.load import Checkpoint

RUN_FILE = "detoxify.toml"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of the run; the defaults are Megatron's for 1.3 billion parameters."""

    steps: int = 78
    micro_batch: int = 4
    global_batch: int = 512
    lr: float = 2e-5
    weight_decay: float = 0.1
    seq_length: int | None = None
    """That of the checkpoint's own training if not given, else its positions."""


def check_texts(path: Path) -> None:
    """Refuse what mt train would not read as a text on each line."""
    check_file(path)
    if guess_format(path) != "jsonl":
        raise MtError(str(path), "by its name holds no JSON lines", "a name that ends with .jsonl")


def make_run(
    checkpoint: "Checkpoint",
    loader: tuple[str, dict[str, Any]],
    recipe: Recipe,
    *,
    tokenizer: "TokenizerConfig | None",
    run_dir: Path,
    seed: int,
) -> dict[str, Any]:
    """The configuration but for its corpus; `loader` is the name and the options of what reads the checkpoint."""
    model, trained = checkpoint.loader.config(), checkpoint.trained_seq_length
    if not isinstance(model, GPTConfig):
        actual = f"holds a model of kind {model.kind!r}, which does not continue a text"
        raise MtError(str(checkpoint.path), actual, "a model of kind gpt")
    data: dict[str, Any] = {}
    if seq_length := recipe.seq_length or trained:
        data["seq_length"] = seq_length
    if tokenizer:
        data["tokenizer"] = tokenizer.model_dump(mode="json", exclude_none=True)
    name, options = loader
    return {
        "data": data,
        "batch": {"micro_batch": recipe.micro_batch, "global_batch": recipe.global_batch},
        "optim": {"lr": recipe.lr, "beta1": 0.9, "beta2": 0.95, "weight_decay": recipe.weight_decay},
        "lr_schedule": {"decay": "constant", "warmup_steps": 0},
        "train": {"steps": recipe.steps, "eval_every": recipe.steps},
        "checkpoint": {"init": f"{name}:{checkpoint.path}", "init_options": options},
        "runtime": {"run_dir": str(run_dir), "seed": seed},
    }


def write_run(run_dir: Path, values: dict[str, Any]) -> Path:
    """Write RUN/detoxify.toml, whole or not at all, and return its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_file(run_dir / RUN_FILE, "w") as file:
        file.write(tomli_w.dumps(values))
    return run_dir / RUN_FILE
