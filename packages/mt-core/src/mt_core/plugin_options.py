"""Options that a signature declares: `top_k: Annotated[int, "Experts of a token."] = 2` is --top-k.

A plugin, a third party's too, declares them as keyword-only parameters of its function or constructor; a dataclass
declares them as its fields. The type says which values an option takes, the text is its help. A `bool` is a switch,
--name or --no-name. What has no default must be given.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from mt_core.errors import Problem, raise_if
from mt_core.plugins import did_you_mean

PLAIN_NAMES = {str: "TEXT", int: "INTEGER", float: "FLOAT", bool: "BOOLEAN", Path: "PATH"}
"""A type → what help calls it, as `mt_core.cli.help` does for options that commands declare themselves."""
UNSET = Parameter.empty
"""The default of what must be given, and the value of an option that no value follows."""


@dataclass(frozen=True, slots=True)
class PluginOption:
    """One option."""

    name: str
    type: Any
    """Anything that pydantic reads from a text."""
    help: str
    default: Any

    @property
    def flag(self) -> str:
        """The option as a user types it, such as `--top-k`."""
        return flag(self.name)

    @property
    def is_switch(self) -> bool:
        """Whether no value follows it."""
        return self.type is bool

    @property
    def usage(self) -> str:
        """The flag and what follows it."""
        if self.is_switch:
            return flag(f"no_{self.name}" if self.default is True else self.name)
        values = [*_values(self.type)]
        return f"{self.flag} {values[0] if len(values) == 1 else f'[{chr(124).join(values)}]'}"

    @property
    def description(self) -> str:
        """The help, and what holds if the option is not given."""
        if self.default is UNSET:
            return f"{self.help}  [required]"
        return self.help if self.default is None or self.is_switch else f"{self.help}  [default: {self.default}]"


Options = Mapping[str, PluginOption]
"""Options of one plugin by the parameter's name."""


def flag(name: str) -> str:
    """A parameter's name as a user types it."""
    return "--" + name.replace("_", "-")


def read_options(target: Callable[..., Any]) -> dict[str, PluginOption]:
    """The options that a plugin's function or class declares."""
    parameters = resolve_parameters(target, keyword_only=True)
    return {p.name: PluginOption(p.name, *split_annotation(p.annotation), p.default) for p in parameters}


def resolve_parameters(target: Callable[..., Any], *, keyword_only: bool = False) -> list[Parameter]:
    """The parameters of a function, class or dataclass with evaluated annotations; one without takes a text.

    With `keyword_only`, the other parameters are left out, and may be annotated with names for type checkers alone.
    """
    signature = inspect.signature(target).parameters
    parameters = {p.name: p for p in signature.values() if p.kind is p.KEYWORD_ONLY or not keyword_only}
    annotations = {name: str if p.annotation is UNSET else p.annotation for name, p in parameters.items()}
    home = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = getattr(home, "__globals__", {})
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), names, include_extras=True)
    return [parameter.replace(annotation=hints[name]) for name, parameter in parameters.items()]


def split_annotation(annotation: Any) -> tuple[Any, str]:
    """The parts of `Annotated[type, "help"]`; other parts, such as pydantic's limits, stay with the type."""
    if get_origin(annotation) is not Annotated:
        return annotation, ""
    kind, *metadata = get_args(annotation)
    texts = [part for part in metadata if isinstance(part, str)]
    limits = tuple(part for part in metadata if not isinstance(part, str))
    return Annotated[kind, *limits] if limits else kind, " ".join(texts)


def _values(kind: Any) -> Iterator[str]:
    """The values of a type as help shows them: those that are allowed, or the type's plain name."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is Literal:
        yield from map(str, parts)
    elif get_origin(kind) is Annotated:
        yield from _values(parts[0])
    elif get_origin(kind) in (Union, UnionType):
        yield from (value for part in parts for value in _values(part))
    else:
        yield PLAIN_NAMES[kind] if kind in PLAIN_NAMES else kind.__name__.upper()


def find_problems(
    given: Mapping[str, Any], plugins: Mapping[str, Options], besides: Iterable[str] = ()
) -> Iterator[Problem]:
    """What is wrong with the options given to several plugins, which are a mapping from what a message calls each.

    `besides` are flags of the command itself, one of which an unknown option may mean.
    """
    known = merge_options(plugins)
    for name in (name for name in given if name not in known):
        allowed = did_you_mean(flag(name), map(flag, known), besides)
        several = len(plugins) > 1
        actual = f"neither {' nor '.join(plugins)} has it" if several else f"{''.join(plugins)} has no such option"
        yield Problem(flag(name), actual, allowed)
    problems = (_find_problem(option, given) for options in plugins.values() for option in options.values())
    yield from dict.fromkeys(problem for problem in problems if problem)  # once where several plugins say the same


def merge_options(plugins: Mapping[str, Options]) -> Options:
    """The options of several plugins together; the last one's where they share a name."""
    return {name: option for options in plugins.values() for name, option in options.items()}


def _find_problem(option: PluginOption, given: Mapping[str, Any]) -> Problem | None:
    """What is wrong with an option's value, or with there being none."""
    from pydantic import TypeAdapter, ValidationError  # here, since help of commands needs no pydantic

    from mt_core.config.loading import value_problem

    if option.name not in given:
        return Problem(option.flag, "required, but not given", option.help) if option.default is UNSET else None
    if (value := given[option.name]) is UNSET:
        return Problem(option.flag, "needs a value", option.usage)
    try:
        TypeAdapter(option.type).validate_python(value)
    except ValidationError as err:
        return value_problem(option.flag, err.errors()[0])
    return None


def assign_options(given: Mapping[str, Any], plugins: Mapping[str, Options]) -> list[dict[str, Any]]:
    """The options of each plugin, converted to their types; one `MtError` names all that is wrong with them."""
    raise_if(find_problems(given, plugins))
    return [convert_values(given, options) for options in plugins.values()]


def convert_values(given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """The given options that a plugin declares, converted to their declared types."""
    from pydantic import TypeAdapter

    return {
        name: TypeAdapter(option.type).validate_python(given[name]) for name, option in options.items() if name in given
    }
