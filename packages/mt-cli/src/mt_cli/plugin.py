"""What mt-cli provides: the commands that compose the other packages."""

from collections.abc import Iterable
from typing import Any

from mt_core.errors import Problem
from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components() -> Iterable[Component]:
    """The commands of mt-cli."""
    return [
        Component(
            "command", "train", "mt_cli.train.command:train", "Train a model from a TOML file.", ("mt-cli[train]",)
        ),
        Component("command", "config", "mt_cli.config:app", "Show, check and compare configurations."),
        Component("command", "plan", "mt_cli.plan.command:plan", "Predict memory, communication and time of a run."),
        Component(
            "command",
            "verify",
            "mt_cli.verify.command:verify",
            "Compare a layout with one rank, number by number.",
            ("mt-cli[train]",),
        ),
        Component("command", "plugins", "mt_cli.plugins_command:plugins", "List what is installed."),
    ]


@hookimpl
def mt_config_rules(config: Any) -> list[Problem]:
    """Rules between the sections of different packages."""
    from mt_cli.rules import problems

    return list(problems(config))
