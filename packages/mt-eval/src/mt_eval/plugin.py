"""What mt-eval provides."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl

if TYPE_CHECKING:
    from mt_core.config.run_config import RunConfig
    from mt_core.contracts import ModelConfig
    from mt_data.config import DataConfig

NEEDS = ("mt-eval",)
TASKS = (
    ("race", "command:race", "RACE: choose the answer to a question on a passage"),
    ("mnli", "command:mnli", "MNLI: entailment, contradiction or neither"),
    ("qqp", "command:qqp", "QQP: do two questions ask the same"),
    ("glue", "command:run_glue", "Any task of GLUE"),
    ("predict", "predict_command:predict", "Predict files with a tuned checkpoint"),
    ("ensemble", "predict_command:ensemble", "Average the predictions of several runs"),
)
"""Name, module and function, and summary of what `mt task` offers."""


@hookimpl
def mt_components() -> Iterable[Component]:
    """Commands `eval`, `generate`, `serve`, `serve-client` and `task`, tasks, data of the last, and scorers."""
    tasks, masked, tuning = "mt_eval.tasks.command", "mt_eval.tasks.masked_command", "mt_eval.finetuning"
    serving, detoxify = "mt_eval.serving", "mt_eval.detoxify"
    return [
        Component("command", "eval", f"{tasks}:app", "Evaluate a checkpoint on a task", NEEDS),
        Component("command", "task", f"{tuning}.command:app", "Fine-tune a model for a task", NEEDS),
        *(Component("task", name, f"{tuning}.{target}", text, NEEDS) for name, target, text in TASKS),
        Component("task", "detoxify", f"{detoxify}.command:app", "Make a model less toxic by its own texts", NEEDS),
        Component("toxicity-scorer", "local", f"{detoxify}.classifier:LocalClassifier", "A small classifier", NEEDS),
        Component("toxicity-scorer", "perspective", f"{detoxify}.perspective:Perspective", "Perspective's API", NEEDS),
        Component("dataset", "glue", f"{tuning}.sections:build_glue", "Labelled texts of GLUE's tasks.", NEEDS),
        Component("dataset", "race", f"{tuning}.sections:build_race", "Questions of RACE with four options.", NEEDS),
        Component("command", "generate", "mt_eval.generation.command:generate", "Continue prompts", NEEDS),
        Component("command", "serve", f"{serving}.command:serve", "Serve a model over HTTP", NEEDS),
        Component(
            "command", "serve-client", f"{serving}.client_command:serve_client", "Type prompts at a server", NEEDS
        ),
        Component("eval-task", "lambada", f"{tasks}:lambada", "LAMBADA: accuracy on the last word", NEEDS),
        Component("eval-task", "harness", "mt_eval.harness.command:harness", "Tasks of lm-evaluation-harness", NEEDS),
        Component("eval-task", "wikitext103", f"{tasks}:wikitext103", "WikiText-103: perplexity per word", NEEDS),
        Component("eval-task", "masked-lm", f"{masked}:masked_lm", "Masked words: loss of a BERT", NEEDS),
        Component("eval-task", "span", f"{masked}:span", "Masked spans: loss of a T5", NEEDS),
        Component("eval-task", "qa", f"{tasks}:qa", "Questions: F1 and exact match of answers", NEEDS),
        Component("eval-task", "perplexity", f"{tasks}:perplexity", "Perplexity of any held-out text", NEEDS),
    ]


@hookimpl
def mt_config_rules(config: "RunConfig[ModelConfig, DataConfig]") -> list[Problem]:
    """What is wrong between the data of a task and the model."""
    if getattr(config.data, "kind", "") not in ("glue", "race"):
        return []
    from mt_eval.finetuning.sections import GLUEData, RACEData, list_problems

    return [*list_problems(config.data, config.model)] if isinstance(config.data, GLUEData | RACEData) else []
