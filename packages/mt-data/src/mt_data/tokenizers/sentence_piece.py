"""The three types of tokenizer that read a SentencePiece .model.

`GPTSentencePieceTokenizer` encodes as the model does. `Llama2Tokenizer` also puts the beginning of sequence before each
text, as Megatron v0.11 and Llama 2 itself do; today's main branch does not, and GPTSentencePieceTokenizer gives what
that gives. Control pieces such as `</s>` in a text are ordinary characters in both (docs/specs/data.md §3.3).

`SentencePieceTokenizer` has the special tokens that BERT and T5 need after the model's pieces. Special tokens in a text
get their ids, `<s>` and `</s>` among them, and each stretch of text between two is encoded for itself, as in Megatron
v0.11. Today's main branch adds no tokens under this name unless asked to: GPTSentencePieceTokenizer gives what that
gives.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mt_core.errors import MtError
from mt_core.files import open_to_read
from mt_core.plugins import import_library
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.base import MaskingTokenizer, count_threads
from mt_data.tokenizers.saved import write_bytes, write_saved

FILE = "tokenizer.model"
ADDED_TOKENS = (("cls", "<CLS>"), ("sep", "<SEP>"), ("eod", "<EOD>"), ("mask", "<MASK>"))
FALLBACK_TOKENS = (("pad", "<PAD>"), ("bos", "<BOS>"), ("eos", "<EOS>"))
"""Names for roles that a model may have under a name of its own."""


class PlainSentencePiece(MaskingTokenizer):
    """A SentencePiece model; its own end of sequence ends documents."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        self.processor = read_model(config)
        self.special = read_roles(self.processor)
        if "eos" not in self.special:
            raise MtError(str(config.model), "has no end-of-sequence piece, which would end documents", "another model")
        self.eod = self.special["eos"]
        self.vocab_size = self.processor.get_piece_size()
        self._begin = config.type == "Llama2Tokenizer"
        if self._begin and "bos" not in self.special:
            raise MtError(str(config.model), "has no beginning-of-sequence piece", "use GPTSentencePieceTokenizer")
        self.prefix_ids = (self.special["bos"],) if self._begin else ()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; Llama2Tokenizer puts the beginning of sequence before them."""
        return self.processor.encode(text, add_bos=self._begin)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the characters [begin, end) of the text that it stands for."""
        ids, offsets = encode_pieces(self.processor, text)
        begin = list(self.prefix_ids)
        return begin + ids, [(0, 0)] * len(begin) + offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        return self.processor.encode(list(texts), add_bos=self._begin, num_threads=count_threads())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control pieces have none."""
        return self.processor.decode([int(number) for number in ids])

    def vocabulary(self) -> dict[str, int]:
        """Piece to id."""
        return read_pieces(self.processor)

    def save(self, directory: Path) -> None:
        """Write tokenizer.model as it was read."""
        write_bytes(directory / FILE, self.processor.serialized_model_proto())
        write_saved(self, self.type, directory, options={"model": FILE})


def read_model(config: TokenizerConfig) -> Any:
    """The library's processor of a .model file."""
    if not config.model:
        raise MtError(config.type, "needs model", "give --tokenizer-model: a SentencePiece .model file")
    path = Path(config.model)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise MtError(str(path), "does not exist", "a SentencePiece .model file")
    library = import_library("sentencepiece", where=config.type, requires=["mt-data[sentencepiece]"])
    if not (content := open_to_read(path).read()):  # the library takes it, and fails later
        raise MtError(str(path), "is empty", "a SentencePiece .model file")
    try:
        return library.SentencePieceProcessor(model_proto=content)
    except RuntimeError as err:
        raise MtError(str(path), "is not a SentencePiece model", "a .model file") from err


def read_roles(processor: Any) -> dict[str, int]:
    """Ids of the roles that the model itself has."""
    ids = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    return {role: number for role, number in ids.items() if number >= 0}


def encode_pieces(processor: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, and the characters [begin, end) of the text that each stands for."""
    encoded = processor.encode(text, return_type="offset_mapping")
    return encoded["ids"], encoded["offsets"]


def read_pieces(processor: Any) -> dict[str, int]:
    """Piece to id."""
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}


class SentencePieceTokenizer(MaskingTokenizer):
    """A SentencePiece model with all roles and any number of extra ids."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        self.processor = read_model(config)
        self._vocabulary = read_pieces(self.processor)
        model_pieces = {role: self.processor.id_to_piece(number) for role, number in read_roles(self.processor).items()}
        named = dict(ADDED_TOKENS) | {role: model_pieces.get(role, spare) for role, spare in FALLBACK_TOKENS}
        extra = [f"<extra_id_{i}>" for i in range(config.vocab_extra_ids)]
        for token in (*named.values(), *extra):
            self._vocabulary.setdefault(token, len(self._vocabulary))
        roles = {role: self._vocabulary[token] for role, token in named.items()}
        self.eod = roles.pop("eod")
        self.special = roles
        self.additional_special_tokens_ids = tuple(self._vocabulary[token] for token in extra)
        self.vocab_size = len(self._vocabulary)
        self._names = {self._vocabulary[token]: token for token in (*named.values(), *extra)}
        self._pattern = re.compile("(" + "|".join(map(re.escape, self._names.values())) + ")")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are found, of two at one place the one that was added first."""
        return self._encode([text], num_threads=1)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and for each the characters [begin, end) of the text that it stands for."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        start = 0
        for place, part in enumerate(self._pattern.split(text)):
            end = start + len(part)
            if place % 2:
                ids.append(self._vocabulary[part])
                offsets.append((start, end))
            else:
                some_ids, some_offsets = encode_pieces(self.processor, part)
                ids += some_ids
                offsets += [(start + first, start + last) for first, last in some_offsets]
            start = end
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        return self._encode(texts, num_threads=count_threads())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, with a space before and after each special token."""
        text, plain = "", []
        for number in map(int, ids):
            if number in self._names:
                text += f"{self.processor.decode(plain)} {self._names[number]} "
                plain = []
            else:
                plain.append(number)
        return text + self.processor.decode(plain)

    def vocabulary(self) -> dict[str, int]:
        """Piece or special token to id."""
        return dict(self._vocabulary)

    def save(self, directory: Path) -> None:
        """Write tokenizer.model as it was read, and the number of extra ids."""
        write_bytes(directory / FILE, self.processor.serialized_model_proto())
        extra = len(self.additional_special_tokens_ids)
        write_saved(self, self.type, directory, options={"model": FILE, "vocab_extra_ids": extra})

    def _encode(self, texts: Sequence[str], *, num_threads: int) -> list[list[int]]:
        parts = [self._pattern.split(text) for text in texts]  # even places are text, odd ones special tokens
        encoded = iter(self.processor.encode([part for split in parts for part in split[::2]], num_threads=num_threads))
        return [self._join(split, [next(encoded) for _ in split[::2]]) for split in parts]

    def _join(self, split: list[str], encoded: list[list[int]]) -> list[int]:
        ids = encoded[0]
        for token, following in zip(split[1::2], encoded[1:], strict=True):
            ids.append(self._vocabulary[token])
            ids += following
        return ids
