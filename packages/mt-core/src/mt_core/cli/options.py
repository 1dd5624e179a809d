"""Options of commands that something else than the command declares: a dataclass, or the plugins that it uses.

Both declare them as parameters of their signature (`mt_core.plugin_options`). A dataclass's are known when the command
is defined, and `expand_options` turns them into Typer's; a plugin's are known once an option names the plugin.
"""

import functools
import inspect
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import is_dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import CompletionItem  # pyright: ignore[reportPrivateImportUsage]
from typer.models import OptionInfo

from mt_core.cli.help import HelpfulCommand
from mt_core.errors import MtError, Problem, raise_if
from mt_core.plugin_options import (
    UNSET,
    Options,
    PluginOption,
    find_problems,
    flag,
    merge_options,
    read_options,
    resolve_parameters,
    split_annotation,
)
from mt_core.plugins import Kind, components, load_declaration

FROM_PLUGINS = "options of the plugins that a command uses"
PluginValues = Annotated[Mapping[str, Any], FROM_PLUGINS]
"""A field of a dataclass of options: what a command line gave of its checkpoint's loader's options, as texts."""


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make each field of a command's dataclass parameters an option of its own.

    A field that the command has a parameter of its own for is left out, and keeps its default.
    """
    parameters = resolve_parameters(command)
    groups: dict[str, Any] = {p.name: p.annotation for p in parameters if is_dataclass(p.annotation)}
    taken = {parameter.name for parameter in parameters if parameter.name not in groups}
    fields = {
        name: [field for field in resolve_parameters(group) if field.name not in taken]
        for name, group in groups.items()
    }
    given = {name: [field.name for field in group if _is_from_plugins(field)] for name, group in fields.items()}
    fields = {name: [field for field in group if not _is_from_plugins(field)] for name, group in fields.items()}
    expanded = [option for parameter in parameters for option in fields.get(parameter.name, [parameter])]
    titles = {field.name: title_group(groups[name]) for name, group in fields.items() for field in group}
    options = [
        option.replace(kind=Parameter.KEYWORD_ONLY, annotation=_add_help(option, titles.get(option.name)))
        for option in expanded
    ]

    if any(given.values()):
        options.append(Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @functools.wraps(command)
    def expanded_command(**values: Any) -> None:
        texts = values.pop("ctx").obj or {} if any(given.values()) else {}
        built = {
            name: groups[name](
                **{f.name: values.pop(f.name) for f in fields[name]}, **dict.fromkeys(given[name], texts)
            )
            for name in groups
        }
        command(**values, **built)

    if any(given.values()):
        expanded_command.command_class = CheckpointCommand  # pyright: ignore[reportAttributeAccessIssue]

    expanded_command.__signature__ = inspect.Signature(options)  # pyright: ignore[reportAttributeAccessIssue]
    expanded_command.__annotations__ = {option.name: option.annotation for option in options}
    return expanded_command


def _is_from_plugins(parameter: Parameter) -> bool:
    return FROM_PLUGINS in getattr(parameter.annotation, "__metadata__", ())


def title_group(group: type) -> str:
    """The title of a dataclass's options in help: `ModelOptions` is "Model options"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", group.__name__).capitalize()


def _add_help(parameter: Parameter, group: str | None) -> Any:
    """The annotation with a text in it as Typer's help, and Typer's own option with the title of its group."""
    kind, text = split_annotation(parameter.annotation)
    if text:
        return Annotated[kind, typer.Option(help=text, rich_help_panel=group)]
    for option in getattr(parameter.annotation, "__metadata__", ()):
        if isinstance(option, OptionInfo) and group and option.rich_help_panel is None:
            option = copy(option)
            option.rich_help_panel = group
            return Annotated[parameter.annotation.__origin__, option]
    return parameter.annotation


class MultiValueCommand(HelpfulCommand):
    """A command whose list options take several values at once, as Megatron's do: `--input a.jsonl b.jsonl`."""

    def rewrite_arguments(self, args: list[str]) -> list[str]:
        """Repeat the option before each further value; the command has no arguments that a value could be."""
        lists = {name for param in self.params if getattr(param, "multiple", False) for name in param.opts}
        repeated: list[str] = []
        option = ""
        for position, arg in enumerate(args):
            if arg.startswith("-"):
                option = arg if arg in lists else ""
            elif option and args[position - 1] != option:
                repeated.append(option)
            repeated.append(arg)
        return super().rewrite_arguments(repeated)


class PluginCommand(HelpfulCommand):
    """A command that takes the options of the plugins that it uses; it finds those given in `ctx.obj`.

    Subclasses say in `kinds` which of its parameters name plugins. Help shows the options of all that are installed.
    Options of the plugin that `loader_b` names end with `-b`.
    """

    kinds: ClassVar[Mapping[str, Kind]]
    """Kind of the plugin that each of these parameters names."""
    settings: ClassVar[dict[str, Any]] = {"ignore_unknown_options": True, "allow_extra_args": True}

    def choose_plugins(self, values: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
        """The plugins' names by parameter, from values of the command's own options; empty where none is named."""
        defaults = {parameter.name: parameter.default for parameter in self.params}
        named = {parameter: values.get(parameter) or defaults.get(parameter) for parameter in self.kinds}
        return {parameter: (name,) if isinstance(name, str) else () for parameter, name in named.items()}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as Typer does, after words that are none of the command's own options were read as the plugins'."""
        args, words = self._split_words(ctx, self.rewrite_arguments(args))
        values, extra, _ = self.make_parser(ctx).parse_args([*args])
        if (words or extra) and not ctx.resilient_parsing and "help" not in values:
            chosen = self.choose_plugins(values)
            if all(chosen.values()):  # else an option is missing, which Typer reports
                plugins = self._read_options(chosen)
                ctx.obj, strays = read_words(words, plugins)
                own_flags = [text for parameter in self.get_params(ctx) for text in parameter.opts]
                unexpected = [
                    Problem(ctx.command_path, f"unexpected {word!r}", "values follow options")
                    for word in (*extra, *strays)
                ]
                raise_if([*unexpected, *find_problems(ctx.obj, plugins, own_flags)])
        return super().parse_args(ctx, args)

    def _split_words(self, ctx: typer.Context, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The command's own words, and options that it does not know, each with the value that follows it."""
        own = {
            text: parameter
            for parameter in self.get_params(ctx)
            for text in (*parameter.opts, *parameter.secondary_opts)
        }
        if all(word.partition("=")[0] in own for word in args if word.startswith("--")):
            return [*args], []
        switches = {flag(option.name) for option in self.list_plugin_options() if option.is_switch}
        mine, others, rest = list[str](), list[str](), deque(args)
        while rest:
            word = rest.popleft()
            name, equals, _ = word.partition("=")
            words = mine if name in own or not word.startswith("--") else others
            words.append(word)
            is_switch = getattr(own[name], "is_flag", False) if name in own else name.replace("--no-", "--") in switches
            takes_value = name.startswith("--") and not equals and not is_switch
            if takes_value and rest and (name in own or not rest[0].startswith("--")):
                words.append(rest.popleft())
        return mine, others

    def list_plugin_options(self) -> Iterator[PluginOption]:
        """The options of every installed plugin that works."""
        for kind in set(self.kinds.values()):
            for name in components(kind):
                with suppress(Exception):  # somebody else's plugin must not keep the others from being used
                    yield from read_options(load_declaration(kind, name)).values()

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        """Complete names of options; those of a plugin once it is named, since it must be imported."""
        completions = super().shell_complete(ctx, incomplete)
        if incomplete.startswith("-"):
            with suppress(MtError):
                options = merge_options(self._read_options(self.choose_plugins(ctx.params))).values()
                named = {option.flag: option.help for option in options if option.flag.startswith(incomplete)}
                completions += [CompletionItem(name, help=text) for name, text in named.items()]
        return completions

    def _read_options(self, chosen: Mapping[str, Sequence[str]]) -> dict[str, Options]:
        """The options of the plugins that are named, by what a message calls each: `loader hf`."""
        return {
            f"{parameter.replace('_', '-')} {name}": _add_suffix(
                read_options(load_declaration(self.kinds[parameter], name)), parameter
            )
            for parameter, names in chosen.items()
            for name in names
        }

    def list_sections(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        """A title and rows of help for each installed plugin that has options, or does not work."""
        for parameter, kind in self.kinds.items():
            for name, plugin in components(kind).items():
                try:
                    options = _add_suffix(read_options(plugin.load_declaration()), parameter).values()
                    rows = [(option.usage, option.description) for option in options]
                except Exception as err:  # somebody else's plugin must not take the help down
                    rows = [("broken", f"{type(err).__name__}: {err}")]
                if rows:
                    yield f"Options of {flag(parameter)} {name}", rows


class CheckpointCommand(PluginCommand):
    """A command that takes the options of the loader that reads its checkpoint, which the files name if `--loader` does
    not."""

    kinds: ClassVar[Mapping[str, Kind]] = {"loader": "ckpt-loader"}
    checkpoints: ClassVar[Mapping[str, Sequence[str]]] = {"loader": ("load_dir", "checkpoint", "path")}
    """Parameters that may name the checkpoint of each loader."""

    def choose_plugins(self, values: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
        """Names of loaders and savers."""
        chosen = super().choose_plugins(values)
        return {
            parameter: names or self._detect_loaders(values, self.checkpoints.get(parameter, ()))
            for parameter, names in chosen.items()
        }

    @staticmethod
    def _detect_loaders(values: Mapping[str, Any], parameters: Sequence[str]) -> Sequence[str]:
        from mt_core.checkpoint.detection import detect_loader

        given = next((values[name] for name in parameters if values.get(name)), ())
        paths = [given] if isinstance(given, str | Path) else given
        return [*dict.fromkeys(detect_loader(Path(path)) for path in paths)]


def _add_suffix(options: Options, parameter: str) -> Options:
    """The options of the plugin that a parameter names: those of `loader_b` end with `_b`."""
    _, separator, suffix = parameter.partition("_")
    named = {name + separator + suffix: option for name, option in options.items()}
    return {name: replace(option, name=name) for name, option in named.items()}


def split_suffix(given: Mapping[str, Any], suffix: str = "_b") -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the first plugin and of the second, whose names have the suffix; without it."""
    second = {name.removesuffix(suffix): value for name, value in given.items() if name.endswith(suffix)}
    return {name: value for name, value in given.items() if not name.endswith(suffix)}, second


def read_words(words: Sequence[str], plugins: Mapping[str, Options]) -> tuple[dict[str, Any], list[str]]:
    """The options that words of a command line give, as texts, and the words that are part of none.

    An unknown option takes the word after it.
    """
    given, strays, rest = dict[str, Any](), list[str](), deque(words)
    switches = {flag(name): (name, True) for name, option in merge_options(plugins).items() if option.is_switch}
    switches |= {flag(f"no_{name}"): (name, False) for name, _ in switches.values()}
    while rest:
        word, equals, value = rest.popleft().partition("=")
        name = word.removeprefix("--").replace("-", "_")
        if not word.startswith("--"):
            strays.append(word + equals + value)
        elif equals:
            given[name] = value
        elif word in switches:
            given.update([switches[word]])
        else:
            given[name] = rest.popleft() if rest and not rest[0].startswith("--") else UNSET
    return given, strays
