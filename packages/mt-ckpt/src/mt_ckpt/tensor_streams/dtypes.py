"""Number formats by the names that users type, and rounding into them."""

import torch
from torch import Tensor

from mt_core.errors import MtError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The dtype for fp32, bf16 or fp16."""
    if name not in DTYPES:
        raise MtError("--dtype", f"unknown name {name!r}", f"allowed: {', '.join(DTYPES)}")
    return DTYPES[name]


def cast(where: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` rounded to `dtype`; a value that would become infinite is refused."""
    rounded = tensor.to(dtype)
    if tensor.dtype != dtype and torch.isinf(rounded).any() and not torch.isinf(tensor).any():
        largest = tensor.abs().max().item()
        raise MtError(where, f"{largest:g} does not fit {str(dtype).removeprefix('torch.')}", "use bf16 or fp32")
    return rounded
