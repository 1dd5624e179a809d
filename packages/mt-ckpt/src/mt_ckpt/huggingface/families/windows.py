"""Sliding windows of attention: which layers of a Hugging Face family have one, and how config.json says so."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mt_models.config import GPTConfig

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Window:
    """How a family describes its windows."""

    default: int | None = None
    """Tokens when config.json has no `sliding_window`; null is none."""
    switched: bool = False
    """The window counts only with `use_sliding_window`."""
    slides: Callable[[int, Mapping[str, Any]], bool] | None = None
    """Whether a layer has the window, for a config.json without `layer_types`; unset, all layers are alike."""
    always_written: bool = False
    """Transformers needs a window, even if no layer has it."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of config.json that describe it."""
        switches = ("use_sliding_window", "max_window_layers") if self.switched else ()
        return ("sliding_window", "layer_types", *switches)

    def read(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Our configuration paths and values."""
        size = raw.get("sliding_window", self.default) if raw.get("use_sliding_window") or not self.switched else None
        flags = self._flags(raw)
        if not size or True not in flags:
            return {"attention.window": None, "attention.window_layers": None}
        return {"attention.window": size, "attention.window_layers": pattern(flags)}

    def write(self, config: GPTConfig) -> Iterator[tuple[str, Any]]:
        """Keys of config.json and their values, for old and new releases."""
        flags = get_window_flags(config)
        idle = config.max_seq_len if self.always_written else None
        yield "sliding_window", config.attention.window or idle
        if self.switched:
            yield "use_sliding_window", True in flags
            yield "max_window_layers", flags.index(True) if True in flags else len(flags)
        if self.slides:
            yield "layer_types", [SLIDING if flag else FULL for flag in flags]

    def complaints(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        """What is wrong with the keys, in a config.json that has every required key."""
        for name in ("sliding_window", "max_window_layers"):
            value = raw.get(name)
            if value is not None and (type(value) is not int or value < 0):
                yield f"{name} is {value!r}", "it must be a number of tokens or layers"
        types, layers = raw.get("layer_types") or [], raw["num_hidden_layers"]
        if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
            yield f"layer_types is {types!r}", "it must be a list of names"
            return
        if not self.slides:
            if len(set(types)) > 1:
                yield f"layer_types has {' and '.join(sorted(set(types)))}", "all layers of this family are alike"
            return
        if types and len(types) != layers:
            yield f"layer_types names {len(types)} layers", f"num_hidden_layers is {layers}"
        for kind in sorted(set(types) - {SLIDING, FULL}):
            yield f"layer_types has {kind!r}", f"only {SLIDING!r} and {FULL!r} are implemented"

    def _flags(self, raw: Mapping[str, Any]) -> list[bool]:
        if self.slides is None:
            return [True]
        if types := raw.get("layer_types"):
            return [kind == SLIDING for kind in types]
        return [self.slides(layer, raw) for layer in range(raw["num_hidden_layers"])]


def get_window_flags(config: GPTConfig) -> list[bool]:
    """Which layers have a window."""
    return [config.attention.get_window(layer) is not None for layer in range(config.layers)]


def pattern(flags: Sequence[bool]) -> tuple[bool, ...] | None:
    """The shortest pattern that gives these flags when it is repeated, None if all have a window."""
    sizes = range(1, len(flags) + 1)
    size = next(n for n in sizes if all(flag == flags[layer % n] for layer, flag in enumerate(flags)))
    return None if all(flags) else tuple(flags[:size])


def from_layer(layer: int, raw: Mapping[str, Any]) -> bool:
    """Qwen's rule: all but the first `max_window_layers`."""
    first = raw.get("max_window_layers")
    return layer >= (28 if first is None else first)
