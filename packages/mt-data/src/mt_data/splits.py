"""`build_splits`: the GPT datasets of a data section, single or blended (docs/specs/data.md §4.2, §4.12)."""

from pathlib import Path

from mt_core.types import Dataset
from mt_data.config import GPTData, Stream
from mt_data.gpt.dataset import Options, gpt_dataset
from mt_data.gpt.indices import Request
from mt_data.index_cache import IndexCache
from mt_data.indexed.reader import IndexedReader
from mt_data.mixture import Parts, Portion, Splits, Wanted, mix
from mt_data.padding import pad_id


def build_splits(
    config: GPTData, *, samples: tuple[Wanted, Wanted, Wanted], seed: int, cache_dir: Path, builder: bool = True
) -> Splits:
    """The three datasets. Of each the samples wanted: 0 for no dataset, None for one epoch of what there is.

    A split that is wanted and empty is an `MtError`. Only the process with `builder` writes indexes; the others wait
    for its files. A dataset may be a little longer than asked for.
    """
    cache = IndexCache(cache_dir, builder)
    found: list[Options] = []

    def build(reader: IndexedReader, portion: Portion) -> Dataset:
        if not found:
            found.append(options(config))
        return gpt_dataset(reader, request(config, portion, seed), cache, found[0])

    return mix(config, Parts(IndexedReader, len, build, "sequences"), samples=samples, cache=cache)


def request(config: GPTData, portion: Portion, seed: int) -> Request:
    """The indexes that a portion of a corpus needs."""
    return Request(
        portion.elements,
        portion.samples,
        config.seq_length,
        seed,
        keep_partial=config.keep_partial_valid and portion.split == 1,
        extra=int(config.extra_token),
    )


def options(config: Stream) -> Options:
    """What the samples of a section say about documents, with the tokenizer's ids."""
    eod = pad = -1
    if config.tokenizer is not None:
        from mt_data.tokenizers import build

        tokenizer = build(config.tokenizer)
        eod, pad = tokenizer.eod, pad_id(tokenizer)
    names = ("eod_mask_loss", "reset_position_ids", "reset_attention_mask", "inter_document_masking")
    return Options(eod, pad, **{name: getattr(config, name, False) for name in names})
