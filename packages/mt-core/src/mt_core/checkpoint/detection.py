"""Which installed loader reads a checkpoint: each says for itself whether it recognises a path. Torch-free.

A loader, or its declaration (`Component.declaration`), may have a static method `recognises(path: Path) -> bool`, which
looks at names of files and little more, and a text `looks_for` that names them. One without is used by its name only.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mt_core.contracts import CheckpointLoader
from mt_core.errors import MtError
from mt_core.plugin_options import assign_options, read_options
from mt_core.plugins import component, components

HUB = "hub"
"""The loader whose paths are names of repositories."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
"""org/name or org/name@revision."""


def detect_loader(path: Path) -> str:
    """The name of the one loader that recognises `path`; `MtError` if none does, or several."""
    names = recognising_loaders(path)
    if len(names) > 1:
        allowed = "choose one by its name: --loader NAME, or checkpoint.init = NAME:PATH"
        raise MtError(str(path), f"several loaders recognise it: {', '.join(names)}", allowed)
    if not names:
        raise _unrecognised(path)
    return names[0]


def recognising_loaders(path: Path) -> list[str]:
    """Names of all installed loaders that recognise `path`, sorted."""
    return [name for name, answer in _ask_loaders(path).items() if answer is True]


def open_checkpoint(
    path: Path, loader: str | None = None, options: Mapping[str, Any] = MappingProxyType({})
) -> CheckpointLoader:
    """The checkpoint at `path`, read by the loader of that name, or by the one that recognises it.

    `options` are keyword-only parameters of the loader; texts are read as their types say.
    """
    name = loader or detect_loader(path)
    load = component("ckpt-loader", name)
    (values,) = assign_options(options, {f"loader {name}": read_options(load)})
    return load(path, **values)


def _ask_loaders(path: Path) -> dict[str, bool | Exception]:
    """Whether each loader with a method for it recognises `path`, or why it could not look."""
    answers: dict[str, bool | Exception] = {}
    for name, loader in components("ckpt-loader").items():
        try:
            if recognises := getattr(loader.load_declaration(), "recognises", None):
                answers[name] = bool(recognises(path))
        except Exception as err:  # somebody else's plugin must not keep the others from reading
            answers[name] = err
    return answers


def _unrecognised(path: Path) -> MtError:
    """The error for a path that no loader recognises: what each looked for, and which could not look."""
    loaders = components("ckpt-loader")
    if not loaders:
        return MtError(str(path), "no checkpoint loader is installed", "pip install mt-ckpt")
    looked_for, failures = [], []
    for name, answer in _ask_loaders(path).items():
        if isinstance(answer, Exception):
            failures.append(f"; loader {name} failed: {' '.join(f'{type(answer).__name__}: {answer}'.split())}")
        else:
            files = getattr(loaders[name].load_declaration(), "looks_for", loaders[name].summary)
            looked_for.append(f"{name}: {files}")
    problem = "holds no checkpoint of a known format" if path.exists() else "no such directory"
    if HUB in loaders and not path.exists() and HUB_NAME.fullmatch(str(path)):
        problem += f"; to fetch it from the Hugging Face hub: --loader {HUB}"
    return MtError(str(path), problem, f"looked for {'; '.join(looked_for)}{''.join(failures)}")
