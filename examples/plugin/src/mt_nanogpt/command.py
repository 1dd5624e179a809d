"""`mt count`: a checkpoint's parameters by part, through whichever loader reads it. No tensor is read."""

import math
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from mt_core.cli.completion import complete_names


def count(
    path: Annotated[Path, typer.Argument(help="A checkpoint.")],
    loader: Annotated[str, typer.Option(help="Its format.", autocompletion=complete_names("ckpt-loader"))] = "nanogpt",
) -> None:
    """Count a checkpoint's parameters by part; a weight that is tied counts once."""
    from mt_core.plugins import component

    parts = Counter()
    for name, shape in component("ckpt-loader", loader)(path).config().canonical_shapes().items():
        part = name.split(".")[2] if name.startswith("layers.") else name.split(".")[0]
        parts[part] += math.prod(shape)
    for part, parameters in parts.most_common():
        print(f"{part:<12} {parameters:>16,} {parameters / parts.total():>7.1%}")
    print(f"{'total':<12} {parts.total():>16,}")
