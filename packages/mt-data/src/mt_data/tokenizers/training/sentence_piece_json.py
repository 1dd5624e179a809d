"""A SentencePiece model as a tokenizer.json, which gives the same ids without the `sentencepiece` library.

`transformers.AutoTokenizer` reads it. A model that normalises text has a table of characters for that, which only its
own format holds; the library has no way to ask for it, so it is read from there (a protocol buffer).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mt_core.plugins import import_library

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "▁"
NORMALIZER_SPEC, CHARSMAP = 3, 2
"""Numbers of the model's field with its normalisation, and of that one's field with the table."""
VARINT, EIGHT_BYTES, COUNTED, FOUR_BYTES = 0, 1, 2, 5
"""Wire types of protocol buffers."""


def convert_model(content: bytes, model_type: str, *, special: Sequence[str], template: str) -> Tokenizer:
    """The library's tokenizer of a SentencePiece model of type `unigram` or `bpe`.

    `special` are the pieces that stand for themselves wherever they are in a text; `template` is what it puts around a
    text, `$A`.
    """
    processor = import_library("sentencepiece", where="tokenizer.json", requires=["mt-data[sentencepiece]"])
    processor = processor.SentencePieceProcessor(model_proto=content)
    charsmap = read_charsmap(content)
    tokenizer = Tokenizer(_make_bpe(processor, special) if model_type == "bpe" else _make_unigram(processor))
    if charsmap:
        steps = [normalizers.Precompiled(charsmap), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="always")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    around = [(token, processor.piece_to_id(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=around)  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def read_charsmap(content: bytes) -> bytes:
    """The table of characters that a model's normalisation replaces; empty if it replaces none."""
    for field, value in _iterate_fields(content):
        if field == NORMALIZER_SPEC:
            return next((table for number, table in _iterate_fields(value) if number == CHARSMAP), b"")
    return b""


def _iterate_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields that have a length."""
    position = 0
    while position < len(message):
        key, position = _read_varint(message, position)
        field, kind = key >> 3, key & 7
        if kind == COUNTED:
            size, position = _read_varint(message, position)
            yield field, message[position : position + size]
            position += size
        elif kind == VARINT:
            _, position = _read_varint(message, position)
        else:
            position += {EIGHT_BYTES: 8, FOUR_BYTES: 4}[kind]


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _make_unigram(processor: "SentencePieceProcessor") -> models.Unigram:
    scores = [(processor.id_to_piece(n), processor.get_score(n)) for n in range(processor.get_piece_size())]
    return models.Unigram(scores, processor.unk_id(), _has_bytes(processor))


def _make_bpe(processor: "SentencePieceProcessor", special: Sequence[str]) -> models.BPE:
    """Merges in the order of the pieces that they make, which is that of ids; a piece may be made in several ways."""
    vocabulary = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    merges = []
    for piece, number in vocabulary.items():
        if piece in special or processor.is_control(number) or processor.is_byte(number):
            continue
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
    unknown = processor.id_to_piece(processor.unk_id())
    return models.BPE(
        vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=_has_bytes(processor), dropout=None
    )


def _has_bytes(processor: "SentencePieceProcessor") -> bool:
    return any(processor.is_byte(number) for number in range(processor.get_piece_size()))
