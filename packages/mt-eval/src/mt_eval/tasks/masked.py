"""Losses of a BERT or a T5 on held-out sentences, with words hidden as the datasets of training hide them.

Samples, masks and the loss are those of `mt train`: the same corpus, split, seed and number of samples give the numbers
that an evaluation during training gave. How words are hidden is in the run's configuration; a checkpoint that has
none, such as one of Hugging Face, takes the defaults of `data.kind`.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mt_core.checkpoint import native
from mt_core.checkpoint.commit_protocol import META
from mt_core.config.loading import Layer, merge, validate
from mt_core.config.sections import RuntimeConfig
from mt_core.contracts import Dataset
from mt_core.contracts.checkpoints import ID_FILES
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_eval.finite import NonFiniteOutput
from mt_eval.load import Checkpoint, load_network
from mt_eval.options import TokenizerOptions
from mt_models.config import BertConfig, T5Config

if TYPE_CHECKING:
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


def compute_losses(
    checkpoint: Checkpoint, samples: Dataset, *, length: int, batch_size: int | None, device: str, dtype: str
) -> tuple[dict[str, float], int]:
    """The loss and the model's metrics, as an evaluation of `mt train` computes them, and the samples in a batch."""
    from mt_core.distributed.mesh import Mesh
    from mt_core.distributed.process_group import pick_device
    from mt_core.training.step import evaluate
    from mt_data.batching.loading import load_batches

    chosen = pick_device(device, where="--device")
    batch = batch_size or max(1, BATCH_TOKENS[chosen.type] // length)
    model = load_network(checkpoint, device=device, dtype=dtype)
    vocab_size = checkpoint.loader.config().vocab_size
    batches = load_batches(samples, micro_batch=batch, consumed=0, order="sequential", vocab_size=vocab_size)
    metrics = evaluate(model, list(batches), Mesh(), chosen)
    if not all(map(isfinite, metrics.values())):
        one_by_one = load_batches(samples, micro_batch=1, consumed=0, order="sequential", vocab_size=vocab_size)
        for number, single in enumerate(one_by_one):
            if not isfinite(evaluate(model, [single], Mesh(), chosen)["loss"]):
                raise NonFiniteOutput(f"{checkpoint.path}: sample {number}", "a loss that is not finite")
    return metrics, batch
