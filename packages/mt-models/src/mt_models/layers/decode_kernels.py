"""Triton kernels of one token's attention to a cache in pages; Triton is imported here, so this module is imported only
where they run.

The number of programs depends on the number of sequences only, and whatever differs between steps is read from tensors,
so a step can be captured as a CUDA graph. Products of queries and keys, and the softmax, are in fp32.

Shape suffixes: N sequences, P blocks of a table, H = G·R query heads, G key/value groups, K features of a head.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mt_models.layers.rope import Rotation

KEY_TILE = 64
"""Keys that a program multiplies at once."""
QUERY_ROWS = 16
"""Rows of the smallest matrix product: queries of a group are padded to as many."""


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _store_kernel(
    q, k, v, cos, sin, slots, q_out, k_cache, v_cache, q_row, k_row, k_head, v_row, v_head, slots_of_group,
    heads: tl.constexpr, size: tl.constexpr, rotated: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    half: tl.constexpr = size // 2
    pair = tl.arange(0, half)
    if head < heads:
        source = q + row * q_row + head * size
        target = q_out + (row * heads + head) * size
    else:
        group = head - heads
        source = k + row * k_row + group * k_head
        place = (group * slots_of_group + tl.load(slots + row)) * size
        target = k_cache + place
        feature = tl.arange(0, size)
        tl.store(v_cache + place + feature, tl.load(v + row * v_row + group * v_head + feature))
    a = tl.load(source + pair)
    b = tl.load(source + half + pair)
    if rotated:
        c = tl.load(cos + row * half + pair)
        s = tl.load(sin + row * half + pair)
        a, b = a.to(c.dtype), b.to(c.dtype)
        a, b = a * c - b * s, b * c + a * s
    tl.store(target + pair, a.to(target.dtype.element_ty))
    tl.store(target + half + pair, b.to(target.dtype.element_ty))


@triton.jit
def _attend_kernel(
    q, k_cache, v_cache, tables, positions, out, scale, softcap, window, table_row, slots_of_group,
    queries: tl.constexpr, rows: tl.constexpr, size: tl.constexpr, block_size: tl.constexpr, tile: tl.constexpr,
    capped: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    length = tl.load(positions + sequence) + 1
    query, feature, offset = tl.arange(0, rows), tl.arange(0, size), tl.arange(0, tile)
    place = ((sequence * groups + group) * queries + query[:, None]) * size + feature[None, :]
    q_tile = tl.load(q + place, mask=query[:, None] < queries, other=0.0)
    largest = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.full((rows,), 0.0, tl.float32)
    result = tl.full((rows, size), 0.0, tl.float32)
    begin = tl.maximum(length - window, 0)
    for start in range(begin // tile * tile, length, tile):
        key = start + offset
        seen = (key < length) & (key >= begin)
        block = tl.load(tables + sequence * table_row + key // block_size, mask=seen, other=0)
        slot = (group * slots_of_group + block * block_size + key % block_size) * size
        k_tile = tl.load(k_cache + slot[None, :] + feature[:, None], mask=seen[None, :], other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee") * scale
        if capped:
            scores = softcap * (1 - 2 / (1 + tl.exp(2 * scores / softcap)))
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.reduce(scores, 1, _larger))
        weights = tl.exp(scores - new_largest[:, None])
        kept = tl.exp(largest - new_largest)
        v_tile = tl.load(v_cache + slot[:, None] + feature[None, :], mask=seen[:, None], other=0.0)
        products = tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        result = result * kept[:, None] + products
        total = total * kept + tl.reduce(weights, 1, _add)
        largest = new_largest
    result = result / total[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=query[:, None] < queries)


def store_rotated(
    qkv: tuple[Tensor, Tensor, Tensor], rotation: Rotation | None, slots_N: Tensor, caches: tuple[Tensor, Tensor]
) -> Tensor:
    """Store keys and values [N, G, K] in a layer's caches [G, blocks, block size, K] and return the queries, [N, H, K].

    Queries and keys are rotated if there is a rotation.
    """
    (q_NHK, k_NGK, v_NGK), (k_cache, v_cache) = qkv, caches
    q_NHK = q_NHK.contiguous()
    (N, H, K), G = q_NHK.shape, len(k_cache)
    cos, sin = (slots_N, slots_N) if rotation is None else (part.reshape(N, -1).contiguous() for part in rotation)
    out_NHK = torch.empty_like(q_NHK)
    kernel: Any = _store_kernel[N, H + G]
    kernel(
        q_NHK, k_NGK, v_NGK, cos, sin, slots_N, out_NHK, k_cache, v_cache,
        q_NHK.stride(0), k_NGK.stride(0), k_NGK.stride(1), v_NGK.stride(0), v_NGK.stride(1),
        k_cache.shape[1] * k_cache.shape[2], heads=H, size=K, rotated=rotation is not None, num_warps=1,
    )  # fmt: skip
    return out_NHK


def attend_pages(
    q_NHK: Tensor,
    caches: tuple[Tensor, Tensor],
    tables_NP: Tensor,
    positions_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attend from the tokens at these positions to those up to them, whose blocks the tables list, [N, H, K]."""
    k_cache, v_cache = caches
    (N, H, K), (G, blocks, block_size, _) = q_NHK.shape, k_cache.shape
    out_NHK = torch.empty_like(q_NHK)
    kernel: Any = _attend_kernel[N, G]
    kernel(
        q_NHK, k_cache, v_cache, tables_NP, positions_N, out_NHK, scale, softcap or 0.0, window or 2**30,
        tables_NP.stride(0), blocks * block_size, queries=H // G, rows=max(QUERY_ROWS, triton.next_power_of_2(H // G)),
        size=K, block_size=block_size, tile=KEY_TILE, capped=softcap is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out_NHK
