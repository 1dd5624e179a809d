"""A command group whose subcommands are installed components, listed from metadata and imported only when run."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from mt_core.cli.help import HelpfulCommand, simplify_help
from mt_core.errors import MtError
from mt_core.plugins import Component, Kind, components, unknown_name


class LazyCommand(TyperCommand):
    """Stands for a command until it is run, so that listing commands imports none of them."""

    def __init__(self, component: Component) -> None:
        super().__init__(component.name, help=component.summary)
        self.component = component

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the real command and hand over to it; one that cannot be imported completes to nothing."""
        try:
            target = self.component.load()
        except MtError:
            if kwargs.get("resilient_parsing"):
                return super().make_context(*args, **kwargs)
            raise
        if not isinstance(target, typer.Typer):  # a plain function with annotated options
            app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
            cls = getattr(target, "command_class", HelpfulCommand)
            app.command(cls=cls, context_settings=getattr(cls, "settings", None))(target)
            target = app
        command: Any = typer.main.get_command(target)
        simplify_help(command)
        return command.make_context(*args, **kwargs)


class PluginGroup(TyperGroup):
    """Subclasses name the kind of component that they list."""

    kind: Kind

    def list_commands(self, ctx: Any) -> list[str]:
        """List the names of the installed components of this kind."""
        return list(components(self.kind))

    def get_command(self, ctx: Any, cmd_name: str) -> LazyCommand | None:
        """Return a stand-in for the command, or None."""
        component = components(self.kind).get(cmd_name)
        return LazyCommand(component) if component else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command as Typer does; the error for an unknown name suggests the nearest known one."""
        known = components(self.kind)
        if args and not args[0].startswith("-") and args[0] not in known and not ctx.resilient_parsing:
            raise unknown_name(self.kind, args[0])
        return super().resolve_command(ctx, args)


def plugin_group(kind: Kind, help: str, *, completion: bool = False) -> typer.Typer:
    """Make a Typer application that lists the components of `kind` as its commands.

    `completion` adds the options that install shell completion.
    """
    group = type(f"{kind}Group", (PluginGroup,), {"kind": kind})
    app = typer.Typer(
        cls=group,
        help=help,
        no_args_is_help=True,
        add_completion=completion,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback(help=help)(_no_options)
    return app


def _no_options() -> None:
    pass
