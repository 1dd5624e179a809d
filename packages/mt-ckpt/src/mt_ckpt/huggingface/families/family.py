"""What there is to say about one Hugging Face family: how it names tensors and where config.json keeps what."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mt_ckpt.huggingface.families.ignored_keys import IGNORED
from mt_ckpt.huggingface.families.windows import Window
from mt_ckpt.tensor_streams.names import Names
from mt_models.config import BertConfig, GPTConfig, T5Config

Config = GPTConfig | BertConfig | T5Config

REQUIRED = object()
"""Default of a key that config.json must have."""

Complaint = tuple[str, str]
"""What a config.json asks for that we lack, and what is allowed."""


@dataclass(frozen=True)
class Key:
    """A key of config.json that holds one of our values."""

    name: str
    default: Any = REQUIRED
    """Value when the key is absent or null; a function gets the whole config.json."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """Our values to theirs, where they differ."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further values of theirs that mean one of ours."""
    also: tuple[str, ...] = ()
    """Names of the key in other releases, read where `name` is absent."""
    nullable: bool = False
    """Null does not mean the default, but none."""

    def read(self, raw: Mapping[str, Any]) -> Any:
        """Our value in a config.json, `REQUIRED` if it must be there and is not."""
        for name in (self.name, *self.also):
            if name in raw and (raw[name] is not None or self.nullable):
                return self._ours(raw[name])
        return self.default(raw) if callable(self.default) else self.default

    def write(self, ours: Any) -> Any:
        """Their value for ours."""
        return self.spelling.get(str(ours), ours)

    def _ours(self, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {**self.aliases, **{theirs: ours for ours, theirs in self.spelling.items()}}.get(value, value)


def _nothing(_: Any) -> Any:
    return ()


@dataclass(frozen=True)
class Family:
    """Tables that translate one family both ways."""

    model_type: str
    architecture: str
    prefix: str
    """What the names of the base model start with; files saved from the base model alone lack it."""
    names: Names
    """Names of tensors as `fused.unpack` leaves them: split, each [out, in], and one for each expert."""
    keys: Mapping[str, Key]
    """Our configuration path to their key."""
    always: Mapping[str, Any]
    """Our configuration path to the value that every model of the family has; a function gets config.json."""
    config: type[Config] = GPTConfig
    """Class of our configuration for the family."""
    base: str = ""
    """The class without heads, if there is a model of ours that it is; its files leave out the prefix."""
    from_tensor_names: Mapping[str, Callable[[Mapping[str, Any], frozenset[str]], Any]] = field(default_factory=dict)
    """Our configuration path to what config.json and the names of all tensors say together."""
    also_written: Callable[[Any], Iterable[tuple[str, Any]]] = _nothing
    """Keys of config.json that functions in `always` read, or that older releases need."""
    also_read: tuple[str, ...] = ()
    """Keys of config.json that functions of the tables read, besides those of `keys`, `required` and `window`."""
    ignored: Mapping[str, Any] = field(default_factory=lambda: IGNORED)
    """Keys of config.json that a file may have and we do not read, to the only value allowed, or `ANY`."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Their switches that change what the model computes: the only value we implement, also when absent."""
    complaints: Callable[[Mapping[str, Any]], Iterable[Complaint]] = _nothing
    """What else a config.json can ask for that we do not implement."""
    further_layers: str = ""
    """Key of config.json with the number of layers behind the last that predict further tokens; we have none."""
    token_ids: Mapping[str, int] = field(default_factory=dict)
    """Ids that transformers takes where config.json has none."""
    window: Window | None = None
    """How config.json describes a sliding attention window."""
    limits: Callable[[Any], Iterable[str]] = _nothing
    """Why transformers would refuse a configuration of this family."""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules whose rows are those of several, one after the other."""
    interleaved: bool = False
    """Rotated features stand in pairs of neighbours, not in halves (of latent attention alone)."""
    transposed: tuple[str, ...] = ()
    """Modules whose weight is stored [in, out]."""
