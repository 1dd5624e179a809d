"""Fused implementations of a chunk's attention: torch's CUDA kernels that return the log-sum-exp, as a table.

torch's kernels take [B, H, T, K] with any strides (here transposed views of [B, T, H, K], never copies) and G < H
groups of keys and values. Their log-sum-exp is natural and fp32: [B, H, T, 1] in cuDNN, [B, H, T] in flash.
A causal mask is only asked of them for as many keys as queries, where its alignment does not matter. Neither reads its
random state when nothing is dropped, but wants a tensor in its place.

On an H200 with K = 128 in bf16 cuDNN runs forward at 580–604 TFLOP/s, flash at half of that (torch 2.11).

Shape suffixes: B batch, T queries, S keys, H query heads, G key/value groups, K head size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Saved = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q_BTHK, k_BSGK, v_BSGK, y_BTHK and lse_BHT."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Fused attention: `forward(q, k, v, causal=)` gives y_BTHK, lse_BHT; `backward(dy, saved, causal=)` dq, dk, dv."""

    name: str
    runs: Callable[[Tensor, Tensor, Tensor], bool]
    """Whether it can take these q_BTHK, k_BSGK and v_BSGK, which are on a CUDA device in 16 bits."""
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def select_kernel(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> Kernel | None:
    """Return the first kernel of the table that runs; None if matmuls must do."""
    if not q_BTHK.is_cuda or q_BTHK.dtype not in (torch.bfloat16, torch.float16):
        return None
    return next((kernel for kernel in KERNELS if kernel.runs(q_BTHK, k_BSGK, v_BSGK)), None)


def _cudnn_runs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    """cuDNN 9 on Hopper or later; its backward takes heads up to 128 and is not bit-reproducible."""
    long_enough = min(q_BTHK.shape[1], k_BSGK.shape[1]) >= 64
    hopper = torch.cuda.get_device_capability(q_BTHK.device) >= (9, 0)
    heads_fit = all(x.shape[-1] % 8 == 0 and x.shape[-1] <= 128 for x in (q_BTHK, v_BSGK))
    return hopper and long_enough and heads_fit and not torch.are_deterministic_algorithms_enabled()


def _flash_runs(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    """Flash attention 2 from Ampere on; it has a deterministic backward, which torch picks itself."""
    head = q_BTHK.shape[-1]
    ampere = torch.cuda.get_device_capability(q_BTHK.device) >= (8, 0)
    return ampere and head % 8 == 0 and head <= 256 and head == v_BSGK.shape[-1]


def _cudnn_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    y_BHTK, lse_BHT1, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, attn_bias=None, compute_log_sumexp=True, is_causal=causal
    )
    return y_BHTK.transpose(1, 2), lse_BHT1.squeeze(-1)


def _cudnn_backward(dy_BTHK: Tensor, saved: Saved, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, lse_BHT = saved
    unused = torch.zeros((), dtype=torch.int64, device=dy_BTHK.device)
    q, k, v, y = (x.transpose(1, 2) for x in tensors)
    grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(dy_BTHK.transpose(1, 2), q, k, v, y, lse_BHT.contiguous()[..., None]),
        *(unused, unused),  # seed and offset of the dropout
        *(None, None, None),  # bias; cumulated lengths of queries and of keys, for ragged batches
        *(q.shape[2], k.shape[2]),
        dropout_p=0.0,
        is_causal=causal,
    )
    return _tokens_first(grads)


def _flash_forward(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
    y_BHTK, lse_BHT, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*heads_first, is_causal=causal)
    return y_BHTK.transpose(1, 2), lse_BHT


def _flash_backward(dy_BTHK: Tensor, saved: Saved, *, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, lse_BHT = saved
    unused = torch.zeros(2, dtype=torch.uint64, device=dy_BTHK.device)
    q, k, v, y = (x.transpose(1, 2) for x in tensors)
    grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *(dy_BTHK.transpose(1, 2), q, k, v, y, lse_BHT.contiguous()),
        *(None, None),  # cumulated lengths of queries and of keys, for ragged batches
        *(q.shape[2], k.shape[2]),
        dropout_p=0.0,
        is_causal=causal,
        philox_seed=unused,
        philox_offset=unused[0],
    )
    return _tokens_first(grads)


def _tokens_first(grads_BHTK: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = grads_BHTK
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


KERNELS = (
    Kernel("cudnn", _cudnn_runs, _cudnn_forward, _cudnn_backward),
    Kernel("flash", _flash_runs, _flash_forward, _flash_backward),
)
