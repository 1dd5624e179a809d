"""Options as they were given to a loader and a saver, by words of a command line or from Python: read and checked."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mt_ckpt.plugin_options import UNSET, Options, PluginOption, flag
from mt_core.config.loading import value_problem
from mt_core.errors import Problem
from mt_core.plugins import did_you_mean


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
    reported = (_problem(option, given) for options in sides.values() for option in options.values())
    yield from dict.fromkeys(problem for problem in reported if problem)  # once where both sides say the same


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
