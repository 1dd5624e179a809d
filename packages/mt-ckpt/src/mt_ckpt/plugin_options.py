"""Options of loaders and savers, a third party's too: the keyword-only parameters of a function or constructor.

`top_k: Annotated[int, "Experts of a token."] = 2` is --top-k: the type says which values it takes, the text is help.
A `bool` is a switch, --name or --no-name. What has no default must be given.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

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


def read_options(target: Callable[..., Any]) -> dict[str, PluginOption]:
    """The options of a loader or saver."""
    parameters = {p.name: p for p in inspect.signature(target).parameters.values() if p.kind is p.KEYWORD_ONLY}
    annotations = {name: str if p.annotation is UNSET else p.annotation for name, p in parameters.items()}
    home = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    names = getattr(home, "__globals__", {})
    hints = get_type_hints(SimpleNamespace(__annotations__=annotations), names, include_extras=True)
    return {name: PluginOption(name, *_type_and_help(hints[name]), p.default) for name, p in parameters.items()}


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
