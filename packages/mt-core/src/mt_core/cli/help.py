"""Help pages: plain names of types, options in groups, and examples that keep their lines.

A group is the `rich_help_panel` of an option; `mt_core.cli.options.expand_options` makes one of each dataclass.
"""

import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mt_core.errors import MtError

TYPE_NAMES = {
    "str": "TEXT",
    "int": "INTEGER",
    "int range": "INTEGER",
    "float": "FLOAT",
    "float range": "FLOAT",
    "path": "PATH",
    "Path": "PATH",
    "file": "PATH",
    "directory": "PATH",
    "bool": "BOOLEAN",
}
"""Python's name of a type → the one that help shows. Versions of Typer that use click show the latter themselves."""
EXAMPLE = re.compile(r"\n\n(?=Examples?:\n)")
SETTING_AS_OPTION = re.compile(r"--(?P<key>[a-z][a-z0-9_]*(\.[a-z0-9_]+)+)(=(?P<value>.*))?", re.DOTALL)


def name_type(label: str) -> str:
    """A type's name as help shows it: `int` is INTEGER, several values are [a|b]."""
    label = label.removeprefix("list[").removesuffix("]") if label.startswith("list[") else label
    return f"[{label}]" if "|" in label else TYPE_NAMES.get(label, label.upper())


def simplify_help(command: TyperCommand | TyperGroup) -> None:
    """Give the options of a command, and of those below it, plain names of types, and keep the lines of examples."""
    context = typer.Context(command)
    if command.help:
        command.help = EXAMPLE.sub("\n\n\b\n", command.help)
    parameters: list[Any] = command.params
    for parameter in parameters:
        display_type = getattr(parameter, "display_type", None)
        if not display_type or getattr(parameter, "is_flag", False):
            continue
        shown = name_type(display_type(context).strip("<>"))
        if parameter.param_type_name == "argument":
            parameter.display_type = lambda ctx, shown=shown: shown  # a metavar would replace the name
        elif parameter.metavar is None:
            parameter.metavar = shown
    commands: dict[str, Any] = getattr(command, "commands", {})
    for below in commands.values():
        simplify_help(below)


class HelpfulCommand(TyperCommand):
    """A command whose help lists options in their groups, those without one first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for the arguments and for each group of options."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, rows in (*groups.items(), *self.list_sections()):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def list_sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """Yield a title and rows for each further section of the help page; subclasses may have some."""
        yield from ()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Typer does what `rewrite_arguments` makes of the words."""
        return super().parse_args(ctx, self.rewrite_arguments(args))

    def rewrite_arguments(self, args: list[str]) -> list[str]:
        """The words to parse; a field of the configuration typed as an option is refused with `--set`."""
        if any("--set" in parameter.opts for parameter in self.params):
            for arg in args:
                if setting := SETTING_AS_OPTION.fullmatch(arg):
                    value = setting["value"] if setting["value"] is not None else "VALUE"
                    raise MtError(arg, "no such option", f"did you mean --set {setting['key']}={value}?")
        return args
