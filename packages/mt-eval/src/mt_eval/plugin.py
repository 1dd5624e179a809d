"""What mt-eval provides."""

from collections.abc import Iterable

from mt_core.plugins import Component, hookimpl

NEEDS = ("mt-eval",)


@hookimpl
def mt_components() -> Iterable[Component]:
    """Commands `eval` and `generate`, and the tasks of `eval`."""
    tasks = "mt_eval.tasks.command"
    return [
        Component("command", "eval", f"{tasks}:app", "Evaluate a checkpoint on a task", NEEDS),
        Component("command", "generate", "mt_eval.generation.command:generate", "Continue prompts", NEEDS),
        Component("eval-task", "lambada", f"{tasks}:lambada", "LAMBADA: accuracy on the last word", NEEDS),
        Component("eval-task", "wikitext103", f"{tasks}:wikitext103", "WikiText-103: perplexity per word", NEEDS),
        Component("eval-task", "perplexity", f"{tasks}:perplexity", "Perplexity of any held-out text", NEEDS),
    ]
