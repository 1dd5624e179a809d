"""Options of loaders and savers, a third party's too: the keyword-only parameters of a function or constructor.

`top_k: Annotated[int, "Experts of a token."] = 2` is --top-k: the type says which values it takes, the text is help.
A `bool` is a switch, --name or --no-name. What has no default must be given.
"""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mt_core.config.load import value_problem
from mt_core.errors import Problem
from mt_core.plugins import did_you_mean

UNSET = inspect.Parameter.empty
"""The default of what must be given, and the value of an option that nothing follows."""


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
        """As it is typed."""
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
        return f"{self.flag} <{'|'.join(_values(self.type))}>"

    @property
    def description(self) -> str:
        """The help, and what holds if the option is not given."""
        if self.default is UNSET:
            return f"{self.help}  [required]"
        return self.help if self.default is None or self.is_switch else f"{self.help}  [default: {self.default}]"


Options = Mapping[str, PluginOption]
"""By the parameter's name."""


def flag(name: str) -> str:
    """A parameter's name as it is typed."""
    return "--" + name.replace("_", "-")


def options_of(target: Callable[..., Any]) -> dict[str, PluginOption]:
    """The options of a loader or saver."""
    found = {p.name: p for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY}
    annotations = {name: str if p.annotation is UNSET else p.annotation for name, p in found.items()}
    home = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = getattr(home, "__globals__", {})
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), names, include_extras=True)
    return {name: PluginOption(name, *_type_and_help(hints[name]), p.default) for name, p in found.items()}


def _type_and_help(hint: Any) -> tuple[Any, str]:
    """The parts of `Annotated[type, "help"]`; other parts, such as pydantic's limits, stay with the type."""
    if get_origin(hint) is not Annotated:
        return hint, ""
    kind, *more = get_args(hint)
    limits = tuple(one for one in more if not isinstance(one, str))
    return Annotated[kind, *limits] if limits else kind, " ".join(one for one in more if isinstance(one, str))


def _values(kind: Any) -> Iterator[str]:
    """The values of a type as help shows them: those that are allowed, or the type's name."""
    parts = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is Literal:
        yield from map(str, parts)
    elif get_origin(kind) is Annotated:
        yield from _values(parts[0])
    elif get_origin(kind) in (Union, UnionType):
        yield from (value for part in parts for value in _values(part))
    else:
        yield kind.__name__.lower()


def _known(sides: Mapping[str, Options]) -> Options:
    return {name: option for options in sides.values() for name, option in options.items()}


def read_words(words: Sequence[str], sides: Mapping[str, Options]) -> tuple[dict[str, Any], list[str]]:
    """The options that words of a command line give, as texts, and the words that are part of none.

    An unknown option takes the word after it.
    """
    given, strays, rest = dict[str, Any](), list[str](), deque(words)
    switches = {flag(name): (name, True) for name, option in _known(sides).items() if option.is_switch}
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


def problems(given: Mapping[str, Any], sides: Mapping[str, Options], besides: Iterable[str] = ()) -> Iterator[Problem]:
    """What is wrong with options that are given to a loader and a saver, which `sides` names.

    `besides` are flags of the command itself, one of which an unknown option may mean.
    """
    known = _known(sides)
    for name in (name for name in given if name not in known):
        allowed = did_you_mean(flag(name), map(flag, known), besides)
        yield Problem(flag(name), f"neither {' nor '.join(sides)} has it", allowed)
    found = (_problem(option, given) for options in sides.values() for option in options.values())
    yield from dict.fromkeys(problem for problem in found if problem)  # once where both sides say the same


def _problem(option: PluginOption, given: Mapping[str, Any]) -> Problem | None:
    """What is wrong with an option's value, or with there being none."""
    if option.name not in given:
        return Problem(option.flag, "required, but not given", option.help) if option.default is UNSET else None
    if (value := given[option.name]) is UNSET:
        return Problem(option.flag, "needs a value", option.usage)
    try:
        TypeAdapter(option.type).validate_python(value)
    except ValidationError as err:
        return value_problem(option.flag, err.errors()[0])
    return None


def values(given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Those of the options given that one side has, as values of their types."""
    return {
        name: TypeAdapter(option.type).validate_python(given[name]) for name, option in options.items() if name in given
    }
