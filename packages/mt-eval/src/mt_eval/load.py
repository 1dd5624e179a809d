"""Open a checkpoint of any format for evaluation: its model in eval mode, and the tokenizer it was trained with.

Loaders are components, so a third party's format works here too; mt-eval imports no format itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mt_core.checkpoint.detection import open_checkpoint
from mt_core.contracts import ID_FILES, CheckpointLoader, Tokenizer, as_module
from mt_core.errors import MtError

if TYPE_CHECKING:
    import torch

    from mt_data.config import TokenizerConfig
    from mt_data.datasets.sft.template import ChatTemplate
    from mt_models.models.gpt import GPT

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a checkpoint is, and the loader that reads it."""

    path: Path
    loader: CheckpointLoader

    @classmethod
    def open(
        cls, path: Path, loader: str | None = None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> "Checkpoint":
        """Open a checkpoint with the loader of that name and its options, or with the one that recognises it."""
        return cls(path, open_checkpoint(path, loader, options))

    @property
    def trained_seq_length(self) -> int | None:
        """Tokens of the samples that the run trained on; None where the checkpoint does not say."""
        return getattr(self.loader, "trained_seq_length", lambda: None)()


def pick_dtype(name: str = "fp32") -> "torch.dtype":
    """The type of parameters and activations."""
    import torch

    if name not in DTYPES:
        raise MtError("--dtype", f"unknown type {name!r}", f"allowed: {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def load_model(checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "fp32") -> "GPT":
    """The GPT with its weights, in eval mode, in `dtype` on `device`; `MtError` for a model of another kind."""
    check_generates(checkpoint)
    return load_network(checkpoint, device=device, dtype=dtype)


def check_generates(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose model is no GPT."""
    from mt_models.config import BertConfig, T5Config

    config = checkpoint.loader.config()
    if isinstance(config, BertConfig | T5Config):
        actual = f"holds a model of kind {config.kind!r}, which does not continue a text"
        raise MtError(str(checkpoint.path), actual, "a model of kind gpt")


def load_network(checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "fp32") -> Any:
    """The model of any kind with its weights, in eval mode, converted to `dtype` on `device`."""
    import torch

    from mt_core.distributed.process_group import pick_device
    from mt_models.canonical import load_stream

    config = checkpoint.loader.config()
    default_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(pick_dtype(dtype))
        with pick_device(device, where="--device"):
            model = config.build()
    finally:
        torch.set_default_dtype(default_dtype)
    load_stream(model, checkpoint.loader.tensors())
    return as_module(model).eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint, override: "TokenizerConfig | None" = None) -> Tokenizer:
    """The tokenizer that travels with the checkpoint, or the one of `override` if it is the same vocabulary."""
    from mt_data import tokenizers

    files = [file for file in checkpoint.loader.tokenizer_files() if file.name not in ID_FILES]
    original = tokenizers.load_tokenizer(files[0].parent) if files else None
    tokenizer = tokenizers.build_tokenizer(override) if override else original
    if tokenizer is None:
        raise MtError(str(checkpoint.path), "no tokenizer travels with this checkpoint", "name one: --tokenizer-type …")
    check_tokenizer(
        tokenizer, original=original, where=str(checkpoint.path), vocab_size=checkpoint.loader.config().vocab_size
    )
    return tokenizer


def read_ends(checkpoint: Checkpoint) -> set[int]:
    """Ids at which the checkpoint's files say that a text ends; empty if they do not say.

    The settings of generation go before what the model's configuration declared.
    """
    for file in sorted(file for file in checkpoint.loader.tokenizer_files() if file.name in ID_FILES):
        try:
            declared = json.loads(file.read_text("utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as err:
            raise MtError(str(file), f"is not a JSON object ({err})", "copy it again") from err
        ids = declared if isinstance(declared, list) else [declared]
        if wrong := [number for number in ids if type(number) is not int and declared is not None]:
            raise MtError(f"{file}: eos_token_id", f"is {wrong[0]!r}", "a token id, or a list of them")
        if declared not in (None, []):
            return set(ids)
    return set()


def choose_ends(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids at which a text ends: those that the checkpoint's files say, else the tokenizer's end of document."""
    end = getattr(tokenizer, "eod", None)
    return frozenset(read_ends(checkpoint) or ({end} if end is not None else ()))


def find_template(checkpoint: Checkpoint, path: Path | None = None) -> "ChatTemplate | None":
    """The chat template in the file `path`, else that of the checkpoint's tokenizer; None if there is none."""
    from mt_data.datasets.sft.template import find_chat_template

    files = [file for file in checkpoint.loader.tokenizer_files() if file.name not in ID_FILES]
    return find_chat_template(files[0].parent if files else checkpoint.path, path)


def check_tokenizer(tokenizer: Tokenizer, *, original: Tokenizer | None, where: str, vocab_size: int) -> None:
    """Refuse a tokenizer with ids the model does not know, or whose ids mean other tokens than in training."""
    from mt_data.tokenizers import fingerprint

    if tokenizer.vocab_size > vocab_size:
        actual = f"the tokenizer has {tokenizer.vocab_size:,} token ids, the model knows {vocab_size:,}"
        raise MtError(where, actual, "use the tokenizer that the checkpoint was trained with")
    if original is not None and tokenizer is not original and fingerprint(tokenizer) != fingerprint(original):
        actual = "the given tokenizer's vocabulary is not that of the checkpoint's own tokenizer"
        raise MtError(where, actual, "leave out the tokenizer options to use its own")
