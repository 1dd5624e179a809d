"""The only place that knows plugins: hook specifications, the manager, and lazy look-up of components.

A plugin is a module under the entry-point group `mt`. It registers light `Component` records; what they name is
imported when it is first used, so `mt --help` imports none of it.
"""

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import pluggy

from mt_core.errors import MtError, Problem, find_nearest, raise_if

hookspec, hookimpl = pluggy.HookspecMarker("mt"), pluggy.HookimplMarker("mt")

Kind = Literal[
    "command",
    "tokenizer",
    "dataset",
    "model",
    "preset",
    "attention",
    "ckpt-loader",
    "ckpt-saver",
    "eval-task",
    "task",
    "toxicity-scorer",
    "optimizer",
]


@dataclass(frozen=True, slots=True)
class Component:
    """A name a user can type, and where its implementation lives. Holding one imports nothing.

    The contract that an implementation of each kind meets is a Protocol in `mt_core.contracts`.
    """

    kind: Kind
    name: str
    target: str
    """`package.module:attribute`, or `package.module:file.toml` for a data file inside a package."""
    summary: str
    requires: tuple[str, ...] = ()
    """What to `pip install` when importing the target fails."""
    declaration: str = ""
    """`package.module:attribute` of a loader's or saver's stand-in, which imports faster: it has the same keyword-only
    parameters, and `recognises`. Unset, the target says them itself."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"component {self.name!r} has kind {self.kind!r}; {did_you_mean(self.kind, get_args(Kind))}"
            )

    def load(self) -> Any:
        """Import and return the implementation; `MtError` names the missing package when one is missing."""
        return self._import(self.target)

    def load_declaration(self) -> Any:
        """Import and return what declares a loader's or saver's options, without the implementation if it can be."""
        return self._import(self.declaration or self.target)

    def _import(self, target: str) -> Any:
        name, _, attribute = target.partition(":")
        module = import_library(name, where=f"{self.kind} {self.name!r}", requires=self.requires)
        return files(module) / attribute if attribute.endswith(".toml") else getattr(module, attribute)


def import_library(module: str, *, where: str, requires: Sequence[str]) -> ModuleType:
    """Import a module that may not be installed; without it, an `MtError` that says which requirements to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as err:
        library = (err.name or module).partition(".")[0]
        install = " ".join(f"'{requirement}'" for requirement in requires) or library
        raise MtError(where, f"needs {library!r}, which is not installed", f"pip install {install}") from err


class Hooks:
    """Hook specifications. Nothing inside a training step calls one."""

    @hookspec
    def mt_components(self) -> Iterable[Component]:
        """Names this plugin provides. Must be cheap: no torch, no file access."""
        raise NotImplementedError

    @hookspec
    def mt_metric_sinks(self, run_dir: Path, names: tuple[str, ...]) -> Any:
        """Return a list of `mt_core.contracts.MetricSink` for those of `log.sinks` that this plugin provides."""

    @hookspec
    def mt_config_rules(self, config: Any) -> Any:
        """Return a list of `Problem` for what is wrong between sections of a loaded `RunConfig`."""


broken: dict[str, str] = {}
"""Plugins that could not be used, with the reason. `mt plugins` lists them."""


@cache
def manager() -> pluggy.PluginManager:
    """Every installed plugin, registered. One that fails to import goes into `broken` and stops nothing."""
    plugins = pluggy.PluginManager("mt")
    plugins.add_hookspecs(Hooks)
    for name in filter(None, map(str.strip, os.environ.get("MT_DISABLE_PLUGINS", "").split(","))):
        plugins.set_blocked(name)
    for entry in entry_points(group="mt"):
        name = entry.dist.name if entry.dist else entry.value
        if plugins.has_plugin(name) or name in broken:  # the second plugin of one distribution
            name = f"{name}:{entry.name}"
        if plugins.is_blocked(name):
            continue
        try:
            plugins.register(entry.load(), name=name)
        except Exception as err:  # somebody else's plugin must not take `mt` down
            broken[name] = _reason(err)
    return plugins


def _reason(err: Exception) -> str:
    return " ".join(f"{type(err).__name__}: {err}".split())


def provided() -> Iterator[tuple[str, Component]]:
    """Yield every component with the name of its plugin; a plugin that fails here is broken too."""
    hooks: list[Any] = manager().hook.mt_components.get_hookimpls()
    for hook in hooks:
        try:
            offered = tuple(hook.function())
            if strange := [thing for thing in offered if not isinstance(thing, Component)]:
                raise TypeError(f"mt_components gave {strange[0]!r}, which is not a Component")
        except Exception as err:  # a plugin that fails here must not take `mt` down either
            broken[hook.plugin_name] = _reason(err)
            continue
        yield from ((hook.plugin_name, component) for component in offered)


def components(kind: Kind) -> dict[str, Component]:
    """Return the components of a kind by name, sorted; two plugins that provide one name are an error naming both."""
    assert kind in get_args(Kind), kind
    providers: dict[str, tuple[str, Component]] = {}
    problems = []
    for plugin, component in provided():
        if component.kind != kind:
            continue
        first, other = providers.setdefault(component.name, (plugin, component))
        if other is not component:
            problems.append(
                Problem(
                    f"{kind} {component.name!r}",
                    f"provided by both {first} ({other.target}) and {plugin} ({component.target})",
                    f"uninstall one, or disable one: MT_DISABLE_PLUGINS={plugin}",
                )
            )
    raise_if(problems)
    return {name: providers[name][1] for name in sorted(providers)}


def component(kind: Kind, name: str) -> Any:
    """Import the implementation behind a name; the error for an unknown name suggests the nearest."""
    return _find_component(kind, name).load()


def load_declaration(kind: Kind, name: str) -> Any:
    """What declares the options of a loader or saver, without its implementation if that can be."""
    return _find_component(kind, name).load_declaration()


def _find_component(kind: Kind, name: str) -> Component:
    known = components(kind)
    if name not in known:
        raise unknown_name(kind, name)
    return known[name]


def unknown_name(kind: Kind, name: str) -> MtError:
    """Return the error for a name that no plugin provides: the nearest, all there are, and plugins that failed."""
    hint = did_you_mean(name, components(kind))
    return MtError(kind, f"unknown name {name!r}", hint + (f"; broken plugins: {', '.join(broken)}" if broken else ""))


def did_you_mean(name: str, known: Iterable[str] | Mapping[str, Any], besides: Iterable[str] = ()) -> str:
    """Return a hint for a misspelt name: the nearest one, and all allowed ones, those of `besides` left out."""
    known = list(known)
    near = find_nearest(name, [*known, *besides])
    return (f"did you mean {near!r}? " if near else "") + f"allowed: {', '.join(known) or 'none'}"
