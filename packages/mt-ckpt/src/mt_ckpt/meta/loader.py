"""Meta's own format, and Mistral's: `consolidated.NN.pth` (or safetensors) and params.json.

Source: docs/specs/checkpoints.md §5.1.

Each file is one tensor rank's share. Rotary positions turn neighbours (2i, 2i + 1); ours turn halves (i, i + d/2).
"""

import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mt_ckpt.meta.config import read_params
from mt_ckpt.meta.files import open_shards
from mt_ckpt.tensor_streams import tokenizer_files
from mt_ckpt.tensor_streams.accounting import set_problems
from mt_ckpt.tensor_streams.names import Names
from mt_ckpt.tensor_streams.sources import read_json
from mt_core.checkpoint.page_cache import drop_pages
from mt_core.errors import MtError, Problem, raise_if
from mt_models.config import GPTConfig

PARAMS = "params.json"
EMBED, HEAD = "tok_embeddings.weight", "output.weight"
BLOCK = {
    "attention_norm": ("attn_norm", None),
    "attention.wq": ("attn.q", 0),
    "attention.wk": ("attn.k", 0),
    "attention.wv": ("attn.v", 0),
    "attention.wo": ("attn.out", 1),
    "ffn_norm": ("mlp_norm", None),
    "feed_forward.w1": ("mlp.gate", 0),
    "feed_forward.w2": ("mlp.down", 1),
    "feed_forward.w3": ("mlp.up", 0),
}
"""Their name of a layer's module to ours, and the dim along which files share it."""
NAMES = Names(
    {
        EMBED: "embed.weight",
        **{f"layers.{{n}}.{theirs}.weight": f"layers.{{n}}.{ours}.weight" for theirs, (ours, _) in BLOCK.items()},
        "norm.weight": "norm.weight",
        HEAD: "head.weight",
    },
    ignore=(r"rope\.freqs$",),  # a buffer; we compute it
)


class Meta:
    """A `CheckpointLoader`. An output layer that is missing, or equal to the embedding (Llama 3.2), is tied to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = read_json(path / PARAMS)
        self.shards = open_shards(path)

    def config(self) -> GPTConfig:
        """The model that params.json describes."""
        return self._config

    @cached_property
    def _config(self) -> GPTConfig:
        rows = self._joined(EMBED).shape[0] if EMBED in self.shards[0] else 1
        config, note = read_params(self.raw, self.path / PARAMS, rows=rows, tied=self._is_tied())
        if note:
            print(f"note: {self.path}: {note}", file=sys.stderr)
        return config

    def _is_tied(self) -> bool:
        if HEAD not in self.shards[0] or EMBED not in self.shards[0]:
            return HEAD not in self.shards[0]
        pairs = [(shard[HEAD], shard[EMBED]) for shard in self.shards]
        alike = all(head.shape == embed.shape and torch.equal(head[:1], embed[:1]) for head, embed in pairs)
        return alike and all(torch.equal(*pair) for pair in pairs)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Canonical name and tensor, one at a time; `MtError` first if the files hold not exactly the model's."""
        self._check()
        used: list[str] = []
        for theirs in self.shards[0]:
            ours = NAMES.ours(theirs)
            if ours and not (theirs == HEAD and self._config.tied):
                tensor = self._joined(theirs)
                if heads := self._rotated(theirs):
                    tensor = half_split(tensor, heads)
                yield ours, tensor
                used.append(theirs)
                for shard in self.shards:
                    drop_pages(*(shard[name] for name in used))

    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer in the directory."""
        return tokenizer_files.find_tokenizer_files(self.path)

    def _rotated(self, name: str) -> int | None:
        """How many heads a query or key projection has."""
        part = self._config.attention
        return {"wq": part.heads, "wk": part.num_kv_heads}.get(name.split(".")[-2])

    def _joined(self, name: str) -> Tensor:
        """A tensor from all files' shares."""
        shares = [shard[name] for shard in self.shards]
        dim = self._shared_dim(name, shares[0])
        return shares[0] if dim is None or len(shares) == 1 else torch.cat(shares, dim)

    def _shared_dim(self, name: str, share: Tensor) -> int | None:
        if name == HEAD:
            return 0
        if name == EMBED:  # Llama 3 cuts the vocabulary, releases before it the width
            return 0 if share.dim() and share.shape[-1] == self.raw.get("dim") else 1
        return next((dim for module, (_, dim) in BLOCK.items() if name.endswith(f".{module}.weight")), None)

    def _check(self) -> None:
        where, expected = str(self.path), dict(self._config.canonical_shapes())
        if self._config.tied and HEAD in self.shards[0]:
            expected["head.weight"] = expected["embed.weight"]
        unknown = [
            Problem(f"{where}: {name}", "unexpected tensor", "a Llama or Mistral model has no such tensor")
            for name in NAMES.unknown(self.shards[0])
        ]
        shapes = [(ours, self._whole_shape(name)) for name in self.shards[0] if (ours := NAMES.ours(name))]
        wrong = [*unknown, *set_problems(where, expected, shapes)]
        count = len(self.shards)
        query = next((shape for name, shape in shapes if name.endswith("attn.q.weight")), ())
        rows = self._config.attention.heads * self._config.attention.head_size
        if wrong and query and query[0] != rows and rows % (query[0] // count) == 0:
            has = f"holds {count} files, its parts are those of {rows * count // query[0]}"
            raise MtError.from_problems([Problem(where, has, "copy all of them, and no others"), *unknown])
        raise_if(wrong)

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        """Shape of the joined tensor, without joining it."""
        shape = [*self.shards[0][name].shape]
        dim = self._shared_dim(name, self.shards[0][name])
        if dim is not None and dim < len(shape):
            shape[dim] *= len(self.shards)
        return tuple(shape)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows (2i, 2i + 1) of each head become rows (i, i + d/2): the same rotary positions in our order."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
