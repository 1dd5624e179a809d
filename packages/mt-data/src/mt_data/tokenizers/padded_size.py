"""How many rows an embedding has for a vocabulary (docs/specs/data.md §3.1)."""


def padded_vocab_size(vocab: int, divisor: int = 128, *, tensor: int = 1) -> int:
    """The next multiple of `divisor` · `tensor`, so that every tensor-parallel rank holds a multiple of `divisor`."""
    assert min(vocab, divisor, tensor) > 0, (vocab, divisor, tensor)
    return -(-vocab // (divisor * tensor)) * divisor * tensor
