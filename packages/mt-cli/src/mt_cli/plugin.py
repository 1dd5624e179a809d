"""What mt-cli provides: the commands that compose the other packages."""

from collections.abc import Iterable

from mt_core.plugins import Component, hookimpl


@hookimpl
def mt_components() -> Iterable[Component]:
    """The commands of mt-cli."""
    return [
        Component(
            "command", "train", "mt_cli.train.command:train", "Train a model from a TOML file.", ("mt-cli[train]",)
        ),
        Component("command", "config", "mt_cli.config_command:app", "Show, check and compare configurations."),
        Component("command", "plugins", "mt_cli.plugins_command:plugins", "List what is installed."),
    ]
