"""Losses of a BERT or a T5 on held-out sentences, with words hidden as the datasets of training hide them.

Samples, masks and the loss are those of `mt train`: the same corpus, split, seed and number of samples give the numbers
that an evaluation during training gave. How words are hidden is in the run's configuration; a checkpoint that has
none, such as one of Hugging Face, takes the defaults of `data.kind`.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_core.checkpoint import native
from mt_core.checkpoint.commit_protocol import META
from mt_core.config.loading import Layer, merge, validate
from mt_core.config.sections import RuntimeConfig
from mt_core.contracts import Dataset, Losses
from mt_core.contracts.checkpoints import ID_FILES
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_eval.finite import NonFiniteOutput
from mt_eval.load import Checkpoint, load_network
from mt_eval.options import TokenizerOptions
from mt_eval.report import Sample
from mt_eval.standard_errors import compute_influences, compute_ratio, compute_share, compute_stderr, pair_errors
from mt_models.config import BertConfig, T5Config

if TYPE_CHECKING:
    from torch import Tensor

    from mt_data.config import BERTData, T5Data, TokenizerConfig

KINDS = {"bert": BertConfig, "t5": T5Config}
"""Kinds of models, and of data sections, that learn from hidden words."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch if no size of it is given."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Which samples are evaluated."""

    data: str
    """Prefix of a .bin/.idx pair of sentences."""
    split: str | None = None
    """Shares of the corpus, the second of which is evaluated; all of it if None."""
    samples: int | None = None
    """Samples in an evaluation; None for one pass over the sentences."""
    seed: int | None = None
    """Seed of the samples and of what they hide; the run's if None."""
    seq_length: int | None = None
    """Tokens in a sample; the run's if None."""


@dataclass(frozen=True, slots=True)
class FirstSamples:
    """The first samples of a dataset, which may have some more than it was asked for."""

    dataset: Dataset
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Sample `index`."""
        return self.dataset[index]


def read_run(path: Path) -> Mapping[str, Any]:
    """The configuration of the run that wrote a native checkpoint, as plain values; empty of any other checkpoint."""
    if not (path / META).exists() and not native.steps(path):
        return {}
    return native.read_meta(native.resolve(path))["config"]


def check_model(checkpoint: Checkpoint, kind: str) -> BertConfig | T5Config:
    """The configuration of a model that predicts hidden words; `MtError` if it is of another kind, or cannot."""
    config = checkpoint.loader.config()
    if not isinstance(config, BertConfig | T5Config) or config.kind != kind:
        raise MtError(str(checkpoint.path), f"holds a model of kind {config.kind!r}", f"a model of kind {kind}")
    if isinstance(config, BertConfig) and not config.lm_head:
        raise MtError(str(checkpoint.path), "its model has no language-model head", "one with model.lm_head = true")
    return config


def make_data_section(
    model: BertConfig | T5Config, run: Mapping[str, Any], held_out: HeldOut, tokenizer: "TokenizerConfig"
) -> "BERTData | T5Data":
    """The run's data section, or that of the defaults, for the held-out corpus alone."""
    from mt_data.config import BERTData, T5Data

    trained: Mapping[str, Any] = run.get("data", {})
    trained = trained if trained.get("kind") == model.kind else default_section(model)
    sources = [name for name in trained if name.endswith("paths") or name in ("paths_file", "split_paths_file")]
    kept = {name: value for name, value in trained.items() if name not in (*sources, "cache_dir", "loader_workers")}
    changes: dict[str, Any] = {
        "kind": model.kind,
        "paths": [held_out.data],
        "split": held_out.split or "0,1,0",
        "tokenizer": tokenizer.model_dump(),
    }
    changes |= {"seq_length": held_out.seq_length} if held_out.seq_length else {}
    section = BERTData if isinstance(model, BertConfig) else T5Data
    values = {**merge(kept, changes), "tokenizer": changes["tokenizer"]}
    data: BERTData | T5Data = validate(section, values, [Layer("data", {})])
    longest = max(data.seq_length, data.decoder_seq_length if isinstance(data, T5Data) else 0)
    if longest > model.max_seq_len:
        raise MtError("--seq-length", f"{longest} tokens", f"1 to {model.max_seq_len}, the model's positions")
    return data


def default_section(model: BertConfig | T5Config) -> dict[str, Any]:
    """What is known of the samples of a model without a run: their length, and whether they have two parts."""
    values: dict[str, Any] = {"seq_length": model.max_seq_len}
    if isinstance(model, BertConfig):
        return values | {"classification_head": model.binary_head and model.token_types != 1}
    return values | {"decoder_seq_length": min(128, model.max_seq_len)}


def make_tokenizer_config(checkpoint: Checkpoint, options: TokenizerOptions) -> "TokenizerConfig":
    """The tokenizer that the options name, or that travels with the checkpoint; it must have the model's ids."""
    from mt_data.tokenizers.build import detect_tokenizer
    from mt_eval.load import load_tokenizer

    given = options.config()
    load_tokenizer(checkpoint, given)
    files = [file for file in checkpoint.loader.tokenizer_files() if file.name not in ID_FILES]
    return given or detect_tokenizer(files[0].parent)


@contextmanager
def open_samples(data: "BERTData | T5Data", held_out: HeldOut, run: Mapping[str, Any]) -> Iterator[tuple[Dataset, int]]:
    """The samples, in a block, and their seed; the index of sentences is in a temporary directory meanwhile."""
    default = RuntimeConfig.model_fields["seed"].default
    seed = run.get("runtime", {}).get("seed", default) if held_out.seed is None else held_out.seed
    build = component("dataset", data.kind)
    with tempfile.TemporaryDirectory() as cache:
        splits = build(data, samples=(0, held_out.samples, 0), seed=seed, cache_dir=Path(cache))
        if splits.valid is None:
            actual = f"{data.split!r} leaves none of {held_out.data} to evaluate"
            raise MtError("--split", actual, "a second share above 0, such as 90,10,0")
        yield FirstSamples(splits.valid, min(held_out.samples or len(splits.valid), len(splits.valid))), seed


@dataclass(frozen=True, slots=True)
class SampleLosses:
    """What a model loses on each sample, by the names under which training logs it."""

    sums: Mapping[str, Sequence[float]]
    """The sum of each loss over what a sample hides, in nats."""
    sizes: Mapping[str, Sequence[float]]
    """Over how many tokens that is the sum; 1 for a loss of the whole sample."""
    shares: Mapping[str, tuple[float, float]]
    """How many samples are right by each metric beside them, such as an accuracy, and of how many."""

    def compute_metrics(self) -> dict[str, float]:
        """Means as an evaluation of `mt train` has them, `loss` the sum of the losses, with standard errors over
        samples."""
        losses = {name: compute_ratio(sums, self.sizes[name]) for name, sums in self.sums.items()}
        influences = [compute_influences(sums, self.sizes[name]) for name, sums in self.sums.items()]
        error = compute_stderr([sum(each) for each in zip(*influences, strict=True)])
        total = sum(value for value, _ in losses.values())
        shares = {name: compute_share(*counts) for name, counts in self.shares.items()}
        return pair_errors({"loss": (total, error), **losses, **shares})

    def list_samples(self) -> Iterator[Sample]:
        """A line for each sample: its number, and each sum with the tokens that it is over."""
        names = list(self.sums)
        columns = [*zip(*(zip(self.sums[name], self.sizes[name], strict=True) for name in names), strict=True)]
        for number, pairs in enumerate(columns):
            yield {"sample": number} | {
                name: {"sum": total, "size": size} for name, (total, size) in zip(names, pairs, strict=True)
            }


def compute_losses(
    checkpoint: Checkpoint, samples: Dataset, *, length: int, batch_size: int | None, device: str, dtype: str
) -> tuple[SampleLosses, int]:
    """The losses of each sample, which are those of `mt train`, and the samples in a batch."""
    import torch

    from mt_core.distributed.mesh import Mesh
    from mt_core.distributed.process_group import pick_device
    from mt_core.training.batch_inputs import prepare_inputs
    from mt_data.batching.loading import load_batches

    chosen = pick_device(device, where="--device")
    rows = batch_size or max(1, BATCH_TOKENS[chosen.type] // length)
    model = load_network(checkpoint, device=device, dtype=dtype)
    vocab_size = checkpoint.loader.config().vocab_size
    batches = load_batches(samples, micro_batch=rows, consumed=0, order="sequential", vocab_size=vocab_size)
    sums, sizes = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    shares = defaultdict[str, list[tuple[float, float]]](list)
    for number, batch in enumerate(batches):
        arguments, mask_BT = prepare_inputs(model, batch, Mesh().context, chosen)
        with torch.inference_mode():
            losses: Losses = model.losses(**arguments)
        for name, (sums_B, sizes_B) in _sum_by_sample(losses, mask_BT).items():
            if not sums_B.isfinite().all():
                place = number * rows + int((~sums_B.isfinite()).nonzero()[0])
                raise NonFiniteOutput(f"{checkpoint.path}: sample {place}", "a loss that is not finite")
            sums[name] += sums_B.tolist()
            sizes[name] += sizes_B.tolist()
        for name, (total, weight) in losses.metrics.items():
            shares[name].append((float(total), float(weight)))
    counts = {name: (sum(t for t, _ in pairs), sum(w for _, w in pairs)) for name, pairs in shares.items()}
    return SampleLosses(sums, sizes, counts), rows


def _sum_by_sample(losses: Losses, mask_BT: "Tensor | None") -> "dict[str, tuple[Tensor, Tensor]]":
    """The sum of each loss over the tokens of a sample that count, fp64 [B], and how many do, [B]."""
    import torch

    named: dict[str, tuple[Tensor, Tensor]] = {}
    if losses.tokens is not None:
        valid_BT = torch.ones_like(losses.tokens) if mask_BT is None else mask_BT
        named[losses.tokens_name or "token_loss"] = (losses.tokens.double() * valid_BT).sum(-1), valid_BT.sum(-1)
    if losses.samples is not None:
        named[losses.samples_name or "sample_loss"] = losses.samples.double(), torch.ones_like(losses.samples)
    return named
