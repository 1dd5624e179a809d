"""What `runtime.compile` replaces equals what it replaces; layers cut over ranks are compiled whole."""

import pytest
import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.apply import UntracedDispatcher, disable_tracing
from mt_core.parallel.context.comm_types import make_context_core
from mt_core.parallel.data.zero1 import add_, set_
from mt_core.parallel.expert.dispatcher import AllToAllDispatcher
from mt_core.parallel.tensor.cross_entropy import (
    CrossEntropyKernels,
    VocabCrossEntropy,
    compile_kernels,
    linear_cross_entropy,
)
from mt_core.parallel.tensor.placement import apply_plan
from mt_core.training.seeds import make_sample_keys
from mt_core.verification.ranks import run_ranks
from mt_models.config import MLA, MoE
from tiny import built, llama

pytestmark = pytest.mark.slow

IDS, ROWS = 21, 24


def loss_and_gradients(op, dtype: torch.dtype, softcap: float | None, biased: bool) -> list[Tensor]:
    """Losses of drawn features and labels, and their gradients, each loss weighted differently."""
    draw = torch.Generator().manual_seed(0)
    x_BTD, weight_VD, bias_V, g_BT = (
        torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((2, 8, 16), (ROWS, 16), (ROWS,), (2, 8))
    )
    labels_BT = torch.randint(IDS, (2, 8), generator=draw)
    bias = {"bias_V": bias_V} if biased else {}
    losses_BT = op(x_BTD, weight_VD, labels_BT, IDS, softcap=softcap, **bias)
    weights = [x_BTD, weight_VD, bias_V][: 2 + biased]
    return [losses_BT.detach(), *torch.autograd.grad((losses_BT * g_BT).sum(), weights)]


@pytest.mark.parametrize("kernels", [CrossEntropyKernels(), compile_kernels()], ids=["plain", "compiled"])
@pytest.mark.parametrize(("softcap", "biased"), [(None, True), (3.0, False)])
def test_the_fused_cross_entropy_is_the_plain_one(kernels, softcap, biased):
    fused = VocabCrossEntropy(Axis("tensor"), False, kernels)
    expected = loss_and_gradients(linear_cross_entropy, torch.float64, softcap, biased)
    found = loss_and_gradients(fused, torch.float64, softcap, biased)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_the_fused_cross_entropy_of_16_bit_features_is_computed_in_fp32():
    exact = loss_and_gradients(linear_cross_entropy, torch.float64, 3.0, False)
    found = loss_and_gradients(VocabCrossEntropy(Axis("tensor"), False), torch.bfloat16, 3.0, False)
    assert found[0].dtype == torch.float32
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_compiled_sums_of_16_bit_gradients_are_torchs():
    compiled_set, compiled_add = torch.compile(set_, dynamic=True), torch.compile(add_, dynamic=True)
    for size in (64, 1000):
        first, second = torch.randn(2, size).bfloat16()
        sums, expected = torch.full((size,), torch.nan), first.float() + second.float()
        compiled_set(sums, first)
        compiled_add(sums, second)
        assert torch.equal(sums, expected)


DROPOUT = {"attention": 0.1, "hidden": 0.1, "embedding": 0.1}
MODELS = {
    "expert": llama(mlp=MoE(ffn_hidden_size=24, experts=4, top_k=2), dropout=DROPOUT),
    "shared and full expert": llama(
        mlp=MoE(
            ffn_hidden_size=24,
            experts=4,
            top_k=2,
            score="sigmoid",
            expert_bias=True,
            jitter=0.1,
            z_loss_coeff=0.1,
            capacity_factor=0.8,
            pad_to_capacity=True,
            shared_ffn_hidden_size=12,
            shared_gate=True,
        )
    ),
    "latent attention by tensor": llama(
        attention=MLA(heads=4, q_lora_rank=12, kv_lora_rank=10, nope_head_size=6, rope_head_size=4, v_head_size=5),
        dropout=DROPOUT,
    ),
}
"""Models that are not like Llama, by what is cut."""


def cut(axis: Axis, by: str):
    """A model whose layers need the axis' ranks, as `parallelize` makes it for torch.compile."""
    model = built(MODELS.get(by, llama(dropout=DROPOUT)))
    tensor, expert = (axis if name in by else Axis(name) for name in ("tensor", "expert"))
    apply_plan(model, model.plan(tensor.size), tensor, sequence="tensor" in by, expert=expert)
    for module in model.modules():
        if isinstance(op := getattr(module, "op", None), AllToAllDispatcher):
            module.op = UntracedDispatcher(op)
    for block in model.layers.values():
        if by == "context":
            block.attn.core = disable_tracing(make_context_core("ring", block.attn.core, axis=axis))
    return model


def gradients_on_ranks(axis: Axis, by: str, compiled: bool) -> list[Tensor]:
    model = cut(axis, by)
    for block in model.layers.values() if compiled else ():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph="tensor" in by)
    tokens_BT = torch.arange(64).view(2, 32) + (0 if "tensor" in by else axis.rank)
    model.token_losses(tokens_BT, tokens_BT, dropout_keys_B=make_sample_keys(0, 0, 2)).sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("by", ["tensor", "latent attention by tensor", "context", "expert", "shared and full expert"])
def test_layers_whose_ranks_exchange_compute_the_same_compiled(by):
    """Those cut by tensor are one graph."""
    plain, compiled = (run_ranks(2, gradients_on_ranks, by, compiled) for compiled in (False, True))
    for ours, theirs in zip(compiled, plain, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
