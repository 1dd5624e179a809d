"""How long a sample is, by the data section. Torch-free."""

from typing import Any


def sequence_lengths(data: Any) -> tuple[int, ...]:
    """Tokens of a sample's sequence; of an encoder's and a decoder's where it has both."""
    return (data.seq_length, data.decoder_seq_length) if hasattr(data, "decoder_seq_length") else (data.seq_length,)
