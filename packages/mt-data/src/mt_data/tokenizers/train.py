"""Training a tokenizer and writing a folder that mt, Megatron and transformers read; the same input, the same files."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mt_core.contracts import Tokenizer
from mt_core.errors import Problem, raise_if
from mt_core.files import atomic_directory
from mt_core.plugins import did_you_mean
from mt_data.config import TokenizerConfig
from mt_data.text_io.lines import check_inputs
from mt_data.tokenizers.build import build_tokenizer, load_tokenizer
from mt_data.tokenizers.training.byte_level_bpe import train_byte_level_bpe
from mt_data.tokenizers.training.request import TrainingRequest
from mt_data.tokenizers.training.sentence_piece import RECIPES, train_sentence_piece
from mt_data.tokenizers.training.word_piece import train_word_piece

TRAINERS: dict[str, Callable[[TrainingRequest, Path], TokenizerConfig]] = {
    "GPT2BPETokenizer": train_byte_level_bpe,
    "BertWordPieceLowerCase": train_word_piece,
    "BertWordPieceCase": train_word_piece,
    **dict.fromkeys(RECIPES, train_sentence_piece),
}
"""What trains each type; it writes the files of one, and names them."""
WITH_EXTRA_IDS = ("BertWordPieceLowerCase", "BertWordPieceCase", "SentencePieceTokenizer")


def train_tokenizer(
    inputs: Sequence[Path],
    output_dir: Path,
    *,
    vocab_size: int,
    key: str = "text",
    type: str = "GPT2BPETokenizer",
    model_type: str | None = None,
    extra_ids: int = 0,
) -> Tokenizer:
    """Train on the texts of the inputs and write a new folder; the parameters are fields of `TrainingRequest`."""
    request = TrainingRequest(tuple(inputs), vocab_size, key, type, model_type, extra_ids)
    raise_if(_find_problems(request))
    check_inputs(request.inputs)
    with atomic_directory(output_dir) as directory:
        build_tokenizer(TRAINERS[request.type](request, directory)).save(directory)
    tokenizer = load_tokenizer(output_dir)
    if tokenizer.vocab_size < vocab_size:
        note = f"the text has {tokenizer.vocab_size} distinct tokens to offer, {vocab_size} were asked for"
        print(f"train-tokenizer: {note}", file=sys.stderr)
    return tokenizer


def _find_problems(request: TrainingRequest) -> list[Problem]:
    if request.type not in TRAINERS:
        return [Problem("--tokenizer-type", f"unknown name {request.type!r}", did_you_mean(request.type, TRAINERS))]
    problems = []
    if request.model_type is not None and request.type not in RECIPES:
        problems.append(Problem("--model-type", f"{request.type} has no such option", f"for {', '.join(RECIPES)}"))
    if request.extra_ids and request.type not in WITH_EXTRA_IDS:
        allowed = f"for {', '.join(WITH_EXTRA_IDS)}"
        problems.append(Problem("--vocab-extra-ids", f"{request.type} has no such option", allowed))
    return problems
