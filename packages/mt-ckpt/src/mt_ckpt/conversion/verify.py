"""Proof of a conversion: source and result give the same logits on fixed tokens, in fp32.

Both are read back through their loaders into mt's own model; a side in Hugging Face format is also compared with
transformers' model of it, where transformers is installed. One model is held in memory at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mt_ckpt.huggingface.loader import HuggingFace
from mt_ckpt.tensor_streams.streams import cast
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.contracts import CheckpointLoader, ModelConfig, as_module
from mt_core.errors import MtError, Problem, raise_if
from mt_models.canonical import load_stream

SEQUENCES, LENGTH = 2, 64
ANSI = re.compile(r"\x1b\[[0-9;]*m")
"""Colours of a terminal."""
TOLERANCE = 1e-5
"""Allowed difference as a part of the largest logit; fp32 sums in another order differ by about 1e-6 of it."""


@dataclass(frozen=True)
class Comparison:
    """Two sets of logits that should be equal."""

    left: str
    right: str
    difference: float
    """Largest absolute difference."""
    largest: float
    """Largest absolute logit."""

    @property
    def equal(self) -> bool:
        """Whether they agree to what fp32 arithmetic leaves open; NaN never does."""
        return self.difference <= TOLERANCE * self.largest

    def __str__(self) -> str:
        return f"{self.left} = {self.right}: logits differ by at most {self.difference:.2g} of {self.largest:.3g}"


def verify_conversion(
    source: CheckpointLoader, source_path: Path, result_path: Path, dtype: torch.dtype | None
) -> tuple[Comparison, ...]:
    """Compare source and result on every side; one `MtError` names every comparison that fails.

    With `dtype`, the result is compared with the source's weights rounded to it.
    """
    tokens_BT = fixed_tokens(source.config())
    comparisons = tuple(_comparisons(source, source_path, result_path, dtype, tokens_BT))
    raise_if(
        Problem(
            str(source_path),
            f"{c.left} and {c.right} disagree: logits differ by {c.difference:.2g}, the largest is {c.largest:.3g}",
            "the result was removed; please report this with the checkpoint's config",
        )
        for c in comparisons
        if not c.equal
    )
    return comparisons


def _comparisons(
    source: CheckpointLoader, source_path: Path, result_path: Path, dtype: torch.dtype | None, tokens_BT: Tensor
) -> Iterator[Comparison]:
    ours = our_logits(source, tokens_BT)
    if has_transformers_model(source):
        yield compare("source in transformers", "source in mt", transformers_logits(source_path, tokens_BT), ours)
    name = "source in mt"
    if dtype:
        ours = our_logits(source, tokens_BT, lambda name, tensor: cast(name, tensor, dtype))
        name = f"source in mt, rounded to {str(dtype).removeprefix('torch.')},"
    result_loader = open_checkpoint(result_path)
    result = our_logits(result_loader, tokens_BT)
    yield compare(name, "result in mt", ours, result)
    if has_transformers_model(result_loader):
        yield compare("result in mt", "result in transformers", result, transformers_logits(result_path, tokens_BT))


def compare(left: str, right: str, left_BTV: Tensor, right_BTV: Tensor) -> Comparison:
    """Two sets of logits with names for a report."""
    if left_BTV.shape != right_BTV.shape:
        raise MtError(f"{left} and {right}", f"logits of shapes {list(left_BTV.shape)} and {list(right_BTV.shape)}")
    return Comparison(left, right, (left_BTV - right_BTV).abs().max().item(), left_BTV.abs().max().item())


def fixed_tokens(config: ModelConfig) -> Tensor:
    """Fixed tokens [B, T], spread over the vocabulary: equal for equal configurations."""
    length = min(LENGTH, config.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (SEQUENCES, length), generator=generator)


@torch.inference_mode()
def our_logits(
    loader: CheckpointLoader, tokens_BT: Tensor, change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> Tensor:
    """Logits [B, T, V] of mt's model, with each canonical tensor passed through `change`, then in fp32."""
    model = loader.config().build()
    as_module(model).to(torch.float32)
    load_stream(model, ((name, change(name, tensor).to(torch.float32)) for name, tensor in loader.tensors()))
    return as_module(model).eval()(tokens_BT)


@torch.inference_mode()
def transformers_logits(path: Path, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of transformers' model, or features of one without heads, in fp32; only safetensors and code of
    its own are used. What it raises is an `MtError` that names it; it prints nothing."""
    import transformers

    how = _reference(open_checkpoint(path).config())
    with _silent(transformers):
        try:
            model = getattr(transformers, how.auto_class).from_pretrained(
                path, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
            tokens = tokens_BT[:, None] if how.choices else tokens_BT
            return model.eval()(**dict.fromkeys(how.inputs, tokens))[how.output]
        except Exception as err:  # of any class: it is another program's
            reason = " ".join(ANSI.sub("", f"{type(err).__name__}: {err}").split())
            problem = f"transformers {transformers.__version__} cannot compute the model, which mt can: {reason[:300]}"
            raise MtError(str(path), problem, "correct the file that it names, or leave --verify out") from err


@contextmanager
def _silent(transformers: ModuleType) -> Iterator[None]:
    """Transformers neither logs nor shows progress while the block runs."""
    log = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


class _Reference(NamedTuple):
    auto_class: str
    output: str = "logits"
    inputs: tuple[str, ...] = ("input_ids",)
    choices: bool = False
    """Whether a sample has several texts, of which one is given here."""


def _reference(config: ModelConfig) -> _Reference:
    """What computes in transformers what our model's forward does."""
    head = getattr(config, "task_head", None)
    match config.kind:
        case "bert" if head is not None and head.kind in ("classification", "regression"):
            return _Reference("AutoModelForSequenceClassification")
        case "bert" if head is not None:
            return _Reference("AutoModelForMultipleChoice", choices=True)
        case "bert" if not getattr(config, "lm_head", False):
            return _Reference("AutoModel", "last_hidden_state")
        case "bert":
            return _Reference("AutoModelForMaskedLM")
        case "t5":
            return _Reference("AutoModelForSeq2SeqLM", inputs=("input_ids", "decoder_input_ids"))
        case _:
            return _Reference("AutoModelForCausalLM")


def has_transformers_model(loader: CheckpointLoader) -> bool:
    """Whether transformers is installed and reads this format."""
    return isinstance(loader, HuggingFace) and find_spec("transformers") is not None


def compare_logits(
    left: Path,
    right: Path,
    *,
    loaders: tuple[str | None, str | None] = (None, None),
    options: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> Iterator[Comparison]:
    """A in mt with B in mt, and each side that transformers can read with its model there; fp32, one at a time."""
    a, b = map(open_checkpoint, (left, right), loaders, options)
    for name in ("kind", "vocab_size"):
        ours, theirs = getattr(a.config(), name), getattr(b.config(), name)
        if ours != theirs:
            raise MtError(f"{right}: {name}", f"{theirs}, but {left} has {ours}", "compare models with the same tokens")
    tokens_BT = fixed_tokens(min((a.config(), b.config()), key=lambda config: config.max_seq_len))
    logits = []
    for label, path, loader in (("A", left, a), ("B", right, b)):
        logits.append(our_logits(loader, tokens_BT))
        if has_transformers_model(loader):
            theirs_BTV = transformers_logits(path, tokens_BT)
            yield compare(f"{label} in transformers", f"{label} in mt", theirs_BTV, logits[-1])
    yield compare("A in mt", "B in mt", *logits)
