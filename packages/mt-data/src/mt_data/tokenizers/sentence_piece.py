"""The plain SentencePiece types, whose ids are those of the .model and no others.

`GPTSentencePieceTokenizer` encodes as the model does. `Llama2Tokenizer` also puts the beginning of sequence before each
text, as Megatron v0.11 and Llama 2 itself do; today's main branch does not, and GPTSentencePieceTokenizer gives what
that gives. Control pieces such as `</s>` standing in a text are ordinary characters in both (docs/specs/data.md §3.3).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers.engine import engine, threads
from mt_data.tokenizers.saved import write_bytes, write_saved
from mt_data.tokenizers.special import MaskingTokenizer

FILE = "tokenizer.model"


class PlainSentencePiece(MaskingTokenizer):
    """A SentencePiece model; its own end of sequence ends documents."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.type = config.type
        self.processor = read_model(config)
        self.special = model_roles(self.processor)
        if "eos" not in self.special:
            raise MtError(str(config.model), "has no end-of-sequence piece, which would end documents", "another model")
        self.eod = self.special["eos"]
        self.vocab_size = self.processor.get_piece_size()
        self._begin = config.type == "Llama2Tokenizer"
        if self._begin and "bos" not in self.special:
            raise MtError(str(config.model), "has no beginning-of-sequence piece", "use GPTSentencePieceTokenizer")

    def encode(self, text: str) -> list[int]:
        """Ids of a text; Llama2Tokenizer puts the beginning of sequence before them."""
        return self.processor.encode(text, add_bos=self._begin)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, faster."""
        return self.processor.encode(list(texts), add_bos=self._begin, num_threads=threads())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control pieces have none."""
        return self.processor.decode([int(number) for number in ids])

    def vocabulary(self) -> dict[str, int]:
        """Piece to id."""
        return pieces(self.processor)

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
    library = engine("sentencepiece", type=config.type)
    try:
        return library.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError as err:
        raise MtError(str(path), "is not a SentencePiece model", "a .model file") from err


def model_roles(processor: Any) -> dict[str, int]:
    """Ids of the roles that the model itself has."""
    ids = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id()}
    return {role: number for role, number in ids.items() if number >= 0}


def pieces(processor: Any) -> dict[str, int]:
    """Piece to id."""
    return {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
