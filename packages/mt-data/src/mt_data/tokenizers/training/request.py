"""What a tokenizer is trained on, and how large it is to be."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mt_core.errors import MtError
from mt_core.progress import progress
from mt_data.text_io.json_documents import parse_chunk
from mt_data.text_io.lines import COMPRESSED, read_chunks

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """The texts of a new tokenizer, and its ids."""

    inputs: tuple[Path, ...]
    vocab_size: int
    """All ids, those of special tokens included."""
    key: str = "text"
    """Key of the text in JSON lines."""
    type: str = "GPT2BPETokenizer"
    """The component of kind `tokenizer` that reads the result."""
    model_type: str | None = None
    """`unigram` or `bpe`, of a SentencePiece model; None for what its recipe has."""
    extra_ids: int = 0
    """How many `<extra_id_…>` the last ids are for."""

    def read_texts(self) -> Iterator[str]:
        """Texts of JSON lines, and the lines of all other files; .gz, .zst and .bz2 are seen through."""
        with progress("read", unit="texts") as advance:
            for path in self.inputs:
                inner = Path(path.stem) if path.suffix in COMPRESSED else path
                for chunk in read_chunks(path):
                    if inner.suffix in JSON_SUFFIXES:
                        documents, problems = parse_chunk(chunk, (self.key,))
                        if problems:
                            raise MtError.from_problems(problems[:1])
                        yield from (text for (text,) in documents)
                    else:
                        yield from (line.decode(errors="replace") + "\n" for line in chunk.lines)
                    advance(len(chunk.lines))

    def describe_empty(self) -> MtError:
        """The error of inputs without any text."""
        return MtError(", ".join(map(str, self.inputs)), "hold no text to learn from", "files with text in them")
