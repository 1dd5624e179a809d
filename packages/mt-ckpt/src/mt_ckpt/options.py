"""A command that takes the options of its loader and its saver besides its own; only `mt` imports this module."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typer.core import CompletionItem, TyperCommand  # pyright: ignore[reportPrivateImportUsage]

from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugins import Kind, component, components

if TYPE_CHECKING:
    from mt_ckpt.plugin_options import Options

SIDES: dict[str, Kind] = {"loader": "ckpt-loader", "saver": "ckpt-saver"}
"""Whose options a command takes."""


class PluginOptions(TyperCommand):
    """Such a command, with parameters `loader`, `saver` and `load_dir`; it finds the options given in `ctx.obj`.

    Help shows those of all that are installed, which it imports. Nothing else imports more than the two.
    """

    settings: ClassVar[dict[str, Any]] = {"ignore_unknown_options": True, "allow_extra_args": True}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Typer does, after words that are none of the command's options were read as the plugins'."""
        from mt_ckpt.given_options import problems, read_words

        own, words, _ = self.make_parser(ctx).parse_args([*args])
        sides = _options(own) if words and not ctx.resilient_parsing and "help" not in own else {}
        if len(sides) == len(SIDES):  # else something is missing, which Typer reports
            ctx.obj, strays = read_words(words, sides)
            flags = [flag for parameter in self.get_params(ctx) for flag in parameter.opts]
            unexpected = (Problem(ctx.command_path, f"unexpected {word!r}", "values follow options") for word in strays)
            raise_if([*unexpected, *problems(ctx.obj, sides, flags)])
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The command's own, then those of each loader and saver."""
        super().format_options(ctx, formatter)
        for title, rows in _help():
            with formatter.section(title):
                formatter.write_dl(rows)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Names of options; those of a loader or saver once it is named, since it must be imported."""
        completions = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            with suppress(MtError):
                named = {option.flag: option.help for side in _options(ctx.params).values() for option in side.values()}
                completions += [
                    CompletionItem(name, help=text) for name, text in named.items() if name.startswith(incomplete)
                ]
        return completions


def _options(own: Mapping[str, Any]) -> "dict[str, Options]":
    """The options of the loader and the saver that are named; files name a loader too."""
    from mt_ckpt.plugin_options import read_options
    from mt_core.checkpoint.detection import detect_loader

    loader = own.get("loader") or (detect_loader(Path(own["load_dir"])) if own.get("load_dir") else None)
    named = {"loader": loader, "saver": own.get("saver")}
    return {f"{side} {name}": read_options(component(SIDES[side], name)) for side, name in named.items() if name}


def _help() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A title and rows for each installed loader and saver that has options, or does not work."""
    from mt_ckpt.plugin_options import read_options

    for side, kind in SIDES.items():
        for name, plugin in components(kind).items():
            try:
                rows = [(option.usage, option.description) for option in read_options(plugin.load()).values()]
            except Exception as err:  # somebody else's plugin must not take the help down
                rows = [("broken", f"{type(err).__name__}: {err}")]
            if rows:
                yield f"Options of --{side} {name}", rows
