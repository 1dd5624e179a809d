"""What mt-eval provides."""

from collections.abc import Iterable

from mt_core.plugins import Component, hookimpl

NEEDS = ("mt-eval",)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Commands `eval` and `generate`, and the tasks of `eval`."""
    tasks, masked = "mt_eval.tasks.command", "mt_eval.tasks.masked_command"
    return [
        Component("command", "eval", f"{tasks}:app", "Evaluate a checkpoint on a task", NEEDS),
        Component("command", "generate", "mt_eval.generation.command:generate", "Continue prompts", NEEDS),
        Component("eval-task", "lambada", f"{tasks}:lambada", "LAMBADA: accuracy on the last word", NEEDS),
        Component("eval-task", "wikitext103", f"{tasks}:wikitext103", "WikiText-103: perplexity per word", NEEDS),
        Component("eval-task", "masked-lm", f"{masked}:masked_lm", "Masked words: loss of a BERT", NEEDS),
        Component("eval-task", "span", f"{masked}:span", "Masked spans: loss of a T5", NEEDS),
        Component("eval-task", "perplexity", f"{tasks}:perplexity", "Perplexity of any held-out text", NEEDS),
    ]
