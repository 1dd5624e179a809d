"""`mt eval harness`; only `mt` imports this module, and it imports lm-eval when it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from mt_core.cli.options import expand_options
from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import import_library
from mt_eval.options import (
    BatchSize,
    Beginning,
    LoadDir,
    ModelOptions,
    Output,
    RankOptions,
    SeqLength,
    TokenizerOptions,
)


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


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Whether a sample is asked as a conversation."""

    apply_chat_template: Annotated[bool, "Ask each sample as a conversation, written by the chat template."] = False
    chat_template: Annotated[Path | None, "Jinja file for conversations; the tokenizer's own if not given."] = None
    system_instruction: Annotated[str | None, "A text that stands before each sample; in a chat, the system's."] = None
    fewshot_as_multiturn: Annotated[
        bool | None,
        Option(
            "--fewshot-as-multiturn/--fewshot-in-one-turn",
            help="Solved examples are turns of the conversation, as they are if not given, or all part of the first.",
            show_default=False,
        ),
    ] = None

    def check(self) -> None:
        """Refuse what means something for conversations only."""
        if self.apply_chat_template:
            return
        raise_if(
            Problem(name, "samples are not asked as conversations", "give --apply-chat-template too")
            for name, value in (
                ("--chat-template", self.chat_template),
                ("--fewshot-as-multiturn", self.fewshot_as_multiturn),
            )
            if value
        )

    @property
    def multiturn(self) -> bool:
        """Whether solved examples are turns of their own."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn


@expand_options
def harness(
    task: HarnessOptions, chat: ChatOptions, model: ModelOptions, ranks: RankOptions, tokenizer: TokenizerOptions
) -> None:
    """lm-evaluation-harness: any of its tasks, or yours in its format.

    Needs the extra lm-eval. Tasks fetch their data from the Hugging Face hub, or from the files that they name.

    Example:
      mt eval harness --load-dir run --tasks arc_easy,hellaswag --limit 100 --output results.json
    """
    import_library("lm_eval", where="mt eval harness", requires=["mt-cli[lm-eval]"])
    from mt_eval.harness.run import run_tasks

    run_tasks(task, chat, model=model, ranks=ranks, tokenizer=tokenizer)
