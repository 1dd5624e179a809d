"""Attention of a chunk with its log-sum-exp: parts merge to the whole, both ways; fused kernels equal matmuls."""

import math

import pytest
import torch

from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.attention_chunks import (
    Chunk,
    attend,
    attend_backward,
    attend_plain,
    attend_plain_backward,
)
from mt_core.parallel.context.fused_kernels import KERNELS, select_kernel
from mt_core.parallel.context.ring import get_visible_part
from mt_core.parallel.context.zigzag import local_positions
from mt_models.layers.attention_cores import attend_eager

EXACT = {"rtol": 1e-12, "atol": 1e-14}
SHAPES = pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])


def tensors(heads, groups, *, tokens=16, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, tokens, n, size) for n in (heads, groups, groups, heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in shapes]


@SHAPES
def test_a_causal_chunk_is_eager_attention_forward_and_backward(heads, groups):
    q, k, v, dy = tensors(heads, groups)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = attend_eager(*leaves)
    expected.backward(dy)
    y, lse = attend(Chunk(q, k, v, causal=True))
    torch.testing.assert_close(y, expected.detach(), **EXACT)
    for found, leaf in zip(attend_backward(Chunk(q, k, v, True), dy, y_BTHK=y, lse_BHT=lse), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad, **EXACT)


@SHAPES
def test_the_log_sum_exp_is_that_of_the_scaled_scores(heads, groups):
    q, k, v, _ = tensors(heads, groups)
    _, lse = attend(Chunk(q, k, v, causal=False))
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(heads // groups, 2)) / math.sqrt(8)
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), **EXACT)


@SHAPES
def test_gradients_of_parts_with_the_merged_log_sum_exp_add_up_to_the_whole(heads, groups):
    q, k, v, dy = tensors(heads, groups)
    whole = Chunk(q, k, v, causal=False)
    y, lse = attend(whole)
    dq, dk, dv = attend_backward(whole, dy, y_BTHK=y, lse_BHT=lse)
    parts = [Chunk(q, k[:, keys], v[:, keys], causal=False) for keys in (slice(0, 5), slice(5, 16))]
    found = [attend_backward(part, dy, y_BTHK=y, lse_BHT=lse) for part in parts]
    torch.testing.assert_close(found[0][0] + found[1][0], dq, **EXACT)
    torch.testing.assert_close(torch.cat((found[0][1], found[1][1]), 1), dk, **EXACT)
    torch.testing.assert_close(torch.cat((found[0][2], found[1][2]), 1), dv, **EXACT)


def test_a_query_that_sees_no_key_gives_zero_with_no_weight_and_no_gradient():
    q, k, v, dy = tensors(2, 1)
    same = torch.ones(2, 16, 16, dtype=torch.bool)
    same[:, 3] = False
    chunk = Chunk(q, k, v, causal=False, same_BTS=same)
    y, lse = attend(chunk)
    assert torch.equal(y[:, 3], torch.zeros_like(y[:, 3]))
    assert (lse[:, :, 3] == -math.inf).all()
    assert lse[:, :, :3].isfinite().all()
    merged = lse.masked_fill(lse == -math.inf, 0.5)  # what such a query saw elsewhere
    dq, dk, dv = attend_backward(chunk, dy, y_BTHK=y, lse_BHT=merged)
    assert torch.equal(dq[:, 3], torch.zeros_like(dq[:, 3]))
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_16_bit_inputs_keep_a_log_sum_exp_in_fp32():
    q, k, v, _ = tensors(4, 2, dtype=torch.bfloat16)
    y, lse = attend(Chunk(q, k, v, causal=True))
    assert (y.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


def test_without_cuda_no_fused_kernel_runs():
    q, k, v, _ = tensors(4, 2, dtype=torch.bfloat16)
    assert select_kernel(q, k, v) is None


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_torch_takes_a_fused_kernels_arguments_and_returns_its_shapes(kernel):
    q, k, v, dy = tensors(8, 2, tokens=128, size=64, dtype=torch.bfloat16, device="meta")
    k, v = k[:, :64], v[:, :64]
    y, lse = kernel.forward(q, k, v, causal=False)
    assert (y.shape, y.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 8, 128), torch.float32)
    gradients = kernel.backward(dy, (q, k, v, y, lse), causal=False)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_all_ranks_cover_the_causal_mask_exactly_once_in_equal_steps(size):
    length = 8
    held = [local_positions(size * length, Axis("context", rank, size)) for rank in range(size)]
    seen = torch.zeros(size * length, size * length, dtype=torch.int64)
    for rank in range(size):
        for source in range(size):
            part = get_visible_part(rank, source, length)
            queries, keys = held[rank][part.queries], held[source][part.keys]
            pairs = torch.ones(len(queries), len(keys), dtype=torch.int64)
            assert source == rank or len(queries) * len(keys) == length**2 // 2
            seen[queries[:, None], keys] += pairs.tril() if part.causal else pairs
    assert torch.equal(seen, torch.ones_like(seen).tril())


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("part", ["causal", "early keys", "late queries"])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 8, 64), (8, 2, 128), (8, 1, 128)])
def test_a_fused_kernel_equals_the_matmuls(kernel, part, heads, groups, size):
    q, k, v, dy = tensors(heads, groups, tokens=512, size=size, dtype=torch.bfloat16, device="cuda")
    if not kernel.runs(q, k, v):
        pytest.skip(f"{kernel.name} does not run on this device")
    rows = slice(256, 512) if part == "late queries" else slice(0, 512)
    keys = slice(0, 256) if part == "early keys" else slice(0, 512)
    chunk = Chunk(q[:, rows], k[:, keys], v[:, keys], causal=part == "causal")
    y, lse = kernel.forward(chunk.q_BTHK, chunk.k_BSGK, chunk.v_BSGK, causal=chunk.causal)
    exact = Chunk(chunk.q_BTHK.double(), chunk.k_BSGK.double(), chunk.v_BSGK.double(), chunk.causal)
    expected, expected_lse = attend_plain(exact)
    assert (y.dtype, lse.dtype, lse.shape) == (torch.bfloat16, torch.float32, expected_lse.shape)
    assert relative(y, expected) < 2**-8
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-3)
    merged = expected_lse + 0.7  # as if other keys had been seen too
    share = expected * math.exp(-0.7)
    found = kernel.backward(
        dy[:, rows],
        (chunk.q_BTHK, chunk.k_BSGK, chunk.v_BSGK, share.bfloat16(), merged.float()),
        causal=chunk.causal,
    )
    wanted = attend_plain_backward(exact, dy[:, rows].double(), y_BTHK=share, lse_BHT=merged)
    for gradient, expected_gradient in zip(found, wanted, strict=True):
        assert relative(gradient, expected_gradient) < 2**-7


@pytest.mark.gpu
def test_the_merged_output_of_fused_parts_is_the_attention_of_all_keys():
    q, k, v, _ = tensors(8, 2, tokens=512, size=128, dtype=torch.bfloat16, device="cuda")
    assert select_kernel(q, k, v) is not None
    early, late = (attend(Chunk(q, k[:, keys], v[:, keys], causal=False)) for keys in (slice(0, 256), slice(256, 512)))
    lse = torch.logaddexp(early[1], late[1])
    weights = [(part_lse - lse).exp().transpose(1, 2)[..., None] for _, part_lse in (early, late)]
    expected, _ = attend_plain(Chunk(q.double(), k.double(), v.double(), causal=False))
    assert relative(weights[0] * early[0] + weights[1] * late[0], expected) < 2**-8
