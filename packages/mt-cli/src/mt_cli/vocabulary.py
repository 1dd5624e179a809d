"""The rows that a model has for token ids, beside the ids that the run's tokenizer has. Torch-free.

`model.vocab_size = "tokenizer"` takes the tokenizer's number. Fewer rows than ids are refused; rows beyond the padding
that tensor ranks need are memory and logits for ids that never come, and warned of.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mt_core.config.loading import Layer, locate, merge_layers
from mt_core.errors import MtError, Problem, raise_if

if TYPE_CHECKING:
    from mt_cli.run_config import FullConfig
    from mt_core.contracts import Tokenizer
    from mt_data.config import TokenizerConfig

FROM_TOKENIZER = "tokenizer"
PADDING = 1024
"""Rows are usual up to the next multiple of this, 128 for each of 8 tensor ranks: 51,200 for GPT-2's 50,257 ids."""


class UnknownVocabulary(MtError):
    """`model.vocab_size = "tokenizer"`, and the run's tokenizer is not named or not there."""


def resolve_vocabulary(layers: Sequence[Layer]) -> list[Layer]:
    """The layers with one that has the tokenizer's number of ids, if `model.vocab_size` asks for it.

    `UnknownVocabulary` if there is no tokenizer to ask.
    """
    values: dict[str, Any] = merge_layers(layers)
    model, data = values.get("model"), values.get("data")
    if not isinstance(model, dict) or model.get("vocab_size") != FROM_TOKENIZER:
        return [*layers]
    table = data.get("tokenizer") if isinstance(data, dict) else None
    if table is None:
        where = locate(layers, ["model", "vocab_size"])
        allowed = "name it in data.tokenizer, or say how many ids there are: --set model.vocab_size=N"
        raise UnknownVocabulary(where, f"{FROM_TOKENIZER!r}, but the run has no tokenizer", allowed)
    return [*layers, set_vocabulary(_count_ids(table))]


def set_vocabulary(size: int) -> Layer:
    """A layer that decides the model's rows."""
    return Layer("data.tokenizer", {"model": {"vocab_size": size}})


def _count_ids(table: object) -> int:
    """Ids of the tokenizer that a table describes; 1 for a table that the check of all fields will refuse."""
    from mt_data.config import TokenizerConfig

    try:
        config = TokenizerConfig.model_validate(table)
    except ValidationError:
        return 1
    try:
        return _build_tokenizer(config).vocab_size
    except MtError as err:
        raise UnknownVocabulary.from_problems(err.problems) from None


def _build_tokenizer(config: "TokenizerConfig") -> "Tokenizer":
    from mt_data.config.rules import tokenizer_problems
    from mt_data.tokenizers import build_tokenizer

    raise_if(tokenizer_problems(config, "data.tokenizer"))
    return build_tokenizer(config)


def find_missing_rows(config: "FullConfig") -> Iterator[Problem]:
    """A tokenizer with more ids than the model has rows, or one that cannot be built from its files."""
    from mt_data.config.rules import tokenizer_problems

    if config.data.tokenizer is None or list(tokenizer_problems(config.data.tokenizer, "data.tokenizer")):
        return  # of which the rules of the data report
    try:
        ids = _build_tokenizer(config.data.tokenizer).vocab_size
    except MtError as err:
        yield from err.problems
        return
    if ids > config.model.vocab_size:
        actual = f"{config.model.vocab_size:,} rows, but the tokenizer has {ids:,} ids"
        yield Problem("model.vocab_size", actual, f'allowed: {ids}, more, or "{FROM_TOKENIZER}"; or another tokenizer')


def find_spare_rows(config: "FullConfig") -> Iterator[Problem]:
    """Rows beyond the tokenizer's ids and usual padding, which no checkpoint decides: a warning, not an error."""
    if config.data.tokenizer is None or config.checkpoint.init:
        return
    ids, rows = _build_tokenizer(config.data.tokenizer).vocab_size, config.model.vocab_size
    if rows > -(-ids // PADDING) * PADDING:
        actual = f"{rows:,} rows, but the tokenizer has {ids:,} ids"
        yield Problem("model.vocab_size", actual, f'"{FROM_TOKENIZER}" takes as many as there are ids')
