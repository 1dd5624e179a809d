"""The id that a dataset takes for padding (docs/specs/data.md §4.8)."""

from mt_core.types import Tokenizer


def pad_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding; −1 if it has none or uses the id for something else too, such as the end of document.

    An id that means two things cannot be taken out of the loss wherever it stands.
    """
    pad = getattr(tokenizer, "pad", -1)
    roles = {role: number for role, number in getattr(tokenizer, "special", {}).items() if role != "pad"}
    return -1 if pad in {tokenizer.eod, *roles.values()} else pad
