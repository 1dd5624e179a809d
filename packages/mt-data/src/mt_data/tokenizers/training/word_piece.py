"""Training BERT's WordPiece on the `tokenizers` library.

The library numbers the pieces of one character in the order in which it happens to meet them, which differs from run to
run and decides between equally frequent pairs. So it runs twice: the first run finds these pieces, and the second gets
them in a fixed order.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, trainers

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.saved import write_text
from mt_data.tokenizers.training.request import TrainingRequest
from mt_data.tokenizers.word_piece import ADDED_TOKENS, FILE, LOWER_CASE, UNKNOWN, make_word_piece

FIRST_TOKENS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
"""The first ids, from 0 on: BERT's padding is 0."""
CONTINUATION = "##"


def train_word_piece(request: TrainingRequest, directory: Path) -> TokenizerConfig:
    """Write vocab.txt, and what `transformers.AutoTokenizer` reads beside it.

    BERT's special tokens have the first ids, `[BOS]`, `[EOS]` and the extra ids the last.
    """
    lower = request.type == LOWER_CASE
    last = (*ADDED_TOKENS.values(), *(f"<extra_id_{number}>" for number in range(request.extra_ids)))
    letters = sorted(set(_train(request, FIRST_TOKENS, size=0, lower=lower)) - set(FIRST_TOKENS))
    if not letters:
        raise request.describe_empty()
    first = (*FIRST_TOKENS, *sorted(letters, key=lambda piece: piece.startswith(CONTINUATION)))
    if request.vocab_size < len(first) + len(last):
        needed = f"at least {len(first) + len(last)}: special tokens, and every character, alone and within a word"
        raise MtError("--vocab-size", f"{request.vocab_size}", needed)
    vocabulary = _train(request, first, size=request.vocab_size - len(last), lower=lower)
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    write_text(directory / FILE, "".join(f"{piece}\n" for piece in (*pieces, *last)))
    _write_hugging_face_config(directory, lower=lower, extra=last[len(ADDED_TOKENS) :])
    return TokenizerConfig(type=request.type, vocab_file=str(directory / FILE), vocab_extra_ids=request.extra_ids)


def _train(request: TrainingRequest, first: tuple[str, ...], *, size: int, lower: bool) -> dict[str, int]:
    """Piece to id, of `size` pieces or as many as the text has; `first` have the first ids."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    splitting = make_word_piece({UNKNOWN: 0}, lower=lower)
    tokenizer.normalizer = splitting.normalizer  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = splitting.pre_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(first), continuing_subword_prefix=CONTINUATION, show_progress=False
    )
    tokenizer.train_from_iterator(request.read_texts(), trainer)
    return json.loads(tokenizer.to_str())["model"]["vocab"]


def _write_hugging_face_config(directory: Path, *, lower: bool, extra: tuple[str, ...]) -> None:
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": lower,
        "additional_special_tokens": list(extra),
        **{f"{token[1:-1].lower()}_token": token for token in (*FIRST_TOKENS, *ADDED_TOKENS.values())},
    }
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
