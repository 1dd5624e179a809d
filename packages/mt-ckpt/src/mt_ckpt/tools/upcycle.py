"""A dense model as a mixture of experts that computes the same: every expert is a copy of the feed-forward layer.

The weights of a token's experts are a softmax over their logits and add up to one (`mlp.normalized`), so
Σ_e w_e · f(x) = f(x) whatever the router says: the logits stay equal to rounding (arXiv:2212.05055 copies likewise).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from mt_ckpt.tensor_streams.streams import check_stream
from mt_core.checkpoint.detection import detect_loader
from mt_core.errors import MtError, Problem
from mt_core.files import atomic_path
from mt_core.plugin_options import assign_options, read_options
from mt_core.plugins import component
from mt_core.progress import progress
from mt_models.config import GPTConfig
from mt_models.initialization import initial

DENSE = re.compile(r"(layers\.\d+\.mlp\.)(gate|up|down)(\.weight)")


@dataclass(frozen=True)
class Formats:
    """How a checkpoint is read and another one written."""

    loader: str | None = None
    """The loader's name; found from the files if not given."""
    saver: str = "native"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword-only parameters of the loader, of the saver, or of both."""


def upcycle(
    path: Path, save_dir: Path, *, experts: int, top_k: int, seed: int = 0, formats: Formats | None = None
) -> GPTConfig:
    """Write the mixture, in the source's dtypes and with its tokenizer; returns its configuration.

    `seed` is that of the routers, which are drawn as at the start of a training.
    """
    formats = formats or Formats()
    loader, saver = formats.loader or detect_loader(path), formats.saver
    load, save = component("ckpt-loader", loader), component("ckpt-saver", saver)
    declared = {f"loader {loader}": read_options(load), f"saver {saver}": read_options(save)}
    loader_options, saver_options = assign_options(formats.options, declared)
    source = load(path, **loader_options)
    config = build_moe_config(source.config(), str(path), experts=experts, top_k=top_k)
    shapes = config.canonical_shapes()
    with progress("upcycling", len(shapes), "tensors") as advance:

        def stream() -> Iterator[tuple[str, Tensor]]:
            tensors = check_stream(str(path), source.config().canonical_shapes(), source.tensors())
            for name, tensor in copy_experts(tensors, config, seed):
                yield name, tensor
                advance(1)

        with atomic_path(save_dir) as staging:
            written = check_stream(str(path), shapes, stream())
            save(staging, config, written, source.tokenizer_files(), **saver_options)
    return config


def build_moe_config(dense: Any, where: str, *, experts: int, top_k: int) -> GPTConfig:
    """The configuration with the feed-forward layer `experts` times; `MtError` if a mixture cannot be that."""
    if dense.kind != "gpt" or dense.mlp.kind != "gated" or dense.mlp.bias:
        layer = f"{dense.mlp.kind!r}{' with biases' if getattr(dense.mlp, 'bias', False) else ''}"
        problem = f"a {dense.kind!r} model whose mlp.kind is {layer}"
        raise MtError(where, problem, "experts are gated layers without biases: give such a gpt model")
    mlp = {"kind": "moe", "ffn_hidden_size": dense.mlp.ffn_hidden_size, "activation": dense.mlp.activation}
    try:
        return GPTConfig.model_validate(dense.model_dump() | {"mlp": {**mlp, "experts": experts, "top_k": top_k}})
    except ValidationError as err:
        raise MtError.from_problems(
            Problem("--experts, --top-k", e["msg"].removeprefix("Value error, "), "2 <= top-k <= experts")
            for e in err.errors()
        ) from None


def copy_experts(tensors: Iterable[tuple[str, Tensor]], config: GPTConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The mixture's tensors, one at a time; a layer's router comes with its gate and has its dtype."""
    shapes = config.canonical_shapes()
    for name, tensor in tensors:
        if not (layer := DENSE.fullmatch(name)):
            yield name, tensor
            continue
        router = f"{layer[1]}router.weight"
        yield f"{layer[1]}experts.{layer[2]}{layer[3]}", tensor.expand(shapes[router][0], *tensor.shape)
        if layer[2] == "gate":
            yield router, initial(config, seed, name=router, shape=shapes[router]).to(tensor.dtype)
