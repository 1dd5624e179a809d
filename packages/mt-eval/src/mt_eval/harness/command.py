"""`mt eval harness`; only `mt` imports this module, and it imports lm-eval when it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from mt_core.cli.options import expand_options
from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_eval.options import BatchSize, Beginning, LoadDir, ModelOptions, Output, SeqLength, TokenizerOptions


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """Which tasks are run on which checkpoint, and how."""

    load_dir: LoadDir
    tasks: Annotated[str, "Names of tasks or groups, patterns, or task files, with commas between them."]
    include_path: Annotated[list[Path] | None, "A folder of your own task files; may be given several times."] = None
    num_fewshot: Annotated[
        int | None, Option(min=0, help="Solved examples before each question; the task's own number if not given.")
    ] = None
    limit: Annotated[
        float | None, Option(help="Only so many samples of each task, or this share of them if below 1.")
    ] = None
    seq_length: SeqLength = None
    batch_size: BatchSize = None
    bos: Beginning = None
    output: Output = None

    def names(self) -> list[str]:
        """The tasks that are asked for, each once."""
        names = [name.strip() for name in self.tasks.split(",")]
        if not all(names):
            raise MtError("--tasks", f"{self.tasks!r} has an empty name", "names with commas between them")
        return list(dict.fromkeys(names))

    def samples(self) -> float | int | None:
        """`limit` as lm-evaluation-harness wants it: a whole number, a share below 1, or nothing."""
        if self.limit is None or 0 < self.limit < 1:
            return self.limit
        if self.limit < 1 or self.limit != int(self.limit):
            raise MtError("--limit", f"{self.limit:g}", "a whole number from 1 on, or a share between 0 and 1")
        return int(self.limit)


@expand_options
def harness(task: HarnessOptions, model: ModelOptions, tokenizer: TokenizerOptions) -> None:
    """lm-evaluation-harness: any of its tasks, or yours in its format.

    Needs the extra lm-eval. Tasks fetch their data from the Hugging Face hub, or from the files that they name.

    Example:
      mt eval harness --load-dir run --tasks arc_easy,hellaswag --limit 100 --output results.json
    """
    import_library("lm_eval", where="mt eval harness", requires=["mt-eval[lm-eval]"])
    from mt_eval.harness.run import run_tasks

    run_tasks(task, model, tokenizer)
