"""The interleaved layout of queries, keys and values: splitting inverts fusing, and the order is the stated one."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mt_models.qkv_layout import fuse_kv, fuse_qkv, interleave_rows, split_kv, split_qkv

sizes = st.integers(1, 5)


def numbered(*shape: int, start: int = 0) -> torch.Tensor:
    """A tensor whose entries are all different."""
    return (start + torch.arange(torch.Size(shape).numel())).reshape(shape)


@given(G=sizes, R=sizes, K=sizes, inputs=st.lists(sizes, max_size=2))
def test_splitting_inverts_fusing_for_weights_and_biases(G, R, K, inputs):
    q, k, v = (numbered(G * heads * K, *inputs, start=10**6 * n) for n, heads in enumerate((R, 1, 1)))
    qkv, kv = fuse_qkv(q, k, v, head_size=K), fuse_kv(k, v, head_size=K)
    assert qkv.shape == (G, R + 2, K, *inputs)
    assert kv.shape == (G, 2, K, *inputs)
    for whole, part in zip((q, k, v, k, v), (*split_qkv(qkv), *split_kv(kv)), strict=True):
        assert torch.equal(whole, part)


@given(G=sizes, R=sizes, K=sizes)
def test_a_group_has_its_queries_then_its_key_and_its_value(G, R, K):
    q, k, v = (numbered(G * heads * K, start=10**6 * n) for n, heads in enumerate((R, 1, 1)))
    qkv_GXK = fuse_qkv(q, k, v, head_size=K)
    for group in range(G):
        for head in range(R):
            first = (group * R + head) * K
            assert torch.equal(qkv_GXK[group, head], q[first : first + K])
        assert torch.equal(qkv_GXK[group, R], k[group * K : (group + 1) * K])
        assert torch.equal(qkv_GXK[group, R + 1], v[group * K : (group + 1) * K])


@given(G=sizes, R=sizes, K=sizes, D=sizes)
def test_interleaved_rows_are_views_that_concatenate_to_the_fused_tensor(G, R, K, D):
    q, k, v = (numbered(G * heads * K, D, start=10**6 * n) for n, heads in enumerate((R, 1, 1)))
    for parts, fused in (((q, k, v), fuse_qkv(q, k, v, head_size=K)), ((k, v), fuse_kv(k, v, head_size=K))):
        rows = list(interleave_rows(parts, G))
        assert torch.equal(torch.cat(rows), fused.flatten(0, 2))
        owners = {part.untyped_storage().data_ptr() for part in parts}
        assert {block.untyped_storage().data_ptr() for block in rows} == owners
