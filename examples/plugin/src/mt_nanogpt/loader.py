"""nanoGPT's `ckpt.pt`: GPT-2's names, but linear weights are [out, in], GELU is exact, one switch sets all biases."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated

import torch

from mt_ckpt.huggingface.families.gpt2 import NAMES
from mt_core.config.loading import model_config
from mt_core.errors import MtError


class NanoGPT:
    """A `mt_core.contracts.CheckpointLoader` for the output directory of a nanoGPT run."""

    def __init__(self, path: Path, *, ckpt: Annotated[str, "File in the directory."] = "ckpt.pt") -> None:
        file = path / ckpt
        try:  # weights_only: nothing in the file is executed; mmap: a tensor is read when it is used
            saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            self.args, self.weights = saved["model_args"], saved["model"]
        except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError) as err:
            raise MtError(str(file), "missing, cut short or not nanoGPT's", "give the out_dir of its train.py") from err

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether commands choose this loader for `path` where none is named."""
        return (path / "ckpt.pt").is_file()

    def config(self):
        """The model's configuration, from `model_args`."""
        layers, heads, size, bias = (self.args[name] for name in ("n_layer", "n_head", "n_embd", "bias"))
        biases = {"qkv_bias": bias, "out_bias": bias}
        attention = {"heads": heads, "num_kv_heads": heads, "head_size": size // heads, **biases}
        mlp = {"kind": "dense", "ffn_hidden_size": 4 * size, "activation": "gelu", "bias": bias}
        parts = {"attention": attention, "mlp": mlp, "norm": {"kind": "layer"}, "position": {"kind": "learned"}}
        sizes = {"hidden_size": size, "vocab_size": self.args["vocab_size"], "max_seq_len": self.args["block_size"]}
        return model_config({"layers": layers, **sizes, **parts, "tied": True})

    def tensors(self):
        """Canonical name and tensor, one at a time; zeros for LayerNorm's biases where nanoGPT has none."""
        for name, tensor in self.weights.items():
            name = name.removeprefix("_orig_mod.")  # of torch.compile
            if ".c_attn." in name:  # query, key and value one below the other
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    yield NAMES.ours(name.replace("c_attn", f"c_attn.{letter}")), part
            elif name != "lm_head.weight" and not NAMES.ignored(name):  # the head is tied to the embedding
                yield NAMES.ours(name) or name, tensor
        if not self.args["bias"]:
            shapes = self.config().canonical_shapes().items()
            yield from ((name, torch.zeros(shape)) for name, shape in shapes if name.endswith("norm.bias"))

    def tokenizer_files(self):
        """None: nanoGPT keeps no tokenizer with its weights."""
        return ()
