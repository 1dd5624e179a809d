"""Training a SentencePiece model, a unigram language model or a BPE, by the `sentencepiece` library.

There are two recipes. T5's, for `SentencePieceTokenizer`: padding 0, end 1, unknown 2, text normalised (NFKC, single
spaces), a unigram model, and the roles and extra ids that BERT and T5 need as pieces of the model. Llama 2's, for
`Llama2Tokenizer` and `GPTSentencePieceTokenizer`: unknown 0, beginning 1, end 2, a BPE that keeps every space, splits
numbers into digits, and spells characters that it lacks in bytes.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mt_core.errors import MtError
from mt_core.plugins import import_library
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.saved import write_bytes, write_text
from mt_data.tokenizers.sentence_piece import ADDED_TOKENS, FILE
from mt_data.tokenizers.training.request import TrainingRequest
from mt_data.tokenizers.training.sentence_piece_json import convert_model

LONGEST_SENTENCE = 1_000
"""Characters; the library drops a sentence of more than 4,192 bytes."""
THREADS = 16
"""A fixed number, as the sums of a unigram model depend on it, and with them its pieces."""
TOO_SMALL = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")
BEGIN = "<BOS>"


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """How a kind of SentencePiece model is trained."""

    model_type: str
    """The type that is trained if none is asked for."""
    tokens: Mapping[str, str]
    """Special tokens by role, as tokenizer_config.json names them."""
    options: Mapping[str, object] = field(default_factory=dict)
    roles: tuple[str, ...] = ()
    """Special tokens that become pieces, with the extra ids."""


T5 = ModelRecipe(
    "unigram",
    {"pad": "<pad>", "eos": "</s>", "unk": "<unk>", "bos": BEGIN, **{k: v for k, v in ADDED_TOKENS if k != "eod"}},
    {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "normalization_rule_name": "nmt_nfkc"},
    (BEGIN, *(token for _, token in ADDED_TOKENS)),
)
LLAMA = ModelRecipe(
    "bpe",
    {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
    },
)
RECIPES = {"SentencePieceTokenizer": T5, "GPTSentencePieceTokenizer": LLAMA, "Llama2Tokenizer": LLAMA}
TEMPLATES = {"SentencePieceTokenizer": "$A </s>", "GPTSentencePieceTokenizer": "$A", "Llama2Tokenizer": "<s> $A"}
"""What transformers puts around a text: T5's end, Llama's beginning."""


def train_sentence_piece(request: TrainingRequest, directory: Path) -> TokenizerConfig:
    """Write tokenizer.model, and the tokenizer.json that `transformers.AutoTokenizer` reads."""
    recipe, extra = RECIPES[request.type], [f"<extra_id_{number}>" for number in range(request.extra_ids)]
    model_type, symbols = request.model_type or recipe.model_type, [*recipe.roles, *extra]
    content = _train(request, recipe, model_type, symbols)
    write_bytes(directory / FILE, content)
    special = dict.fromkeys((*recipe.tokens.values(), *symbols))
    converted = convert_model(content, model_type, special=list(special), template=TEMPLATES[request.type])
    write_text(directory / "tokenizer.json", converted.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": extra}
    config |= {f"{role}_token": token for role, token in recipe.tokens.items()}
    write_text(directory / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return TokenizerConfig(type=request.type, model=str(directory / FILE), vocab_extra_ids=request.extra_ids)


def _train(request: TrainingRequest, recipe: ModelRecipe, model_type: str, symbols: list[str]) -> bytes:
    library = import_library("sentencepiece", where=request.type, requires=["mt-data[sentencepiece]"])
    sentences, model = _cut_sentences(request.read_texts()), io.BytesIO()
    if (first := next(sentences, None)) is None:
        raise request.describe_empty()
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=_put_back(first, sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=request.vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=symbols,
            num_threads=THREADS,
            minloglevel=3,
            **recipe.options,
        )
    except RuntimeError as err:
        if needed := TOO_SMALL.search(str(err)):
            allowed = f"at least {needed[1]}: special tokens, and the characters of the text"
            raise MtError("--vocab-size", f"{request.vocab_size}", allowed) from err
        message = " ".join(str(err).split())
        raise MtError("--vocab-size", f"{request.vocab_size}: the library says {message!r}", "another size") from err
    return model.getvalue()


def _put_back(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _cut_sentences(texts: Iterator[str]) -> Iterator[str]:
    """Lines that are not blank, long ones cut where there is a space."""
    for text in texts:
        for line in text.split("\n"):
            while len(line) > LONGEST_SENTENCE:
                end = line.rfind(" ", 1, LONGEST_SENTENCE)
                end = end if end > 0 else LONGEST_SENTENCE
                yield line[:end]
                line = line[end:]
            if line.strip():
                yield line
