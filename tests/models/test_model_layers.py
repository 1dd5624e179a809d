"""Each layer equals its definition, written out naively, in fp64."""

import math

import pytest
import torch
from torch import Tensor

from models.parts import attention, tiny
from mt_models import config
from mt_models.layers.attention import Attention
from mt_models.layers.attention_cores import eager, sdpa
from mt_models.layers.basic import Embedding, Linear, make_norm
from mt_models.layers.mlp import ACTIVATIONS, make_mlp
from mt_models.layers.rope import make_rotation, rotate

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fill(module: torch.nn.Module) -> torch.nn.Module:
    module.double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed)
    return module


def test_linear_maps_the_last_dims_by_a_weight_in_its_logical_shape():
    layer = fill(Linear((2, 3), (4, 5), bias=True))
    x = normal(7, 2, 3)
    assert layer.weight.shape == (4, 5, 2, 3)
    torch.testing.assert_close(layer(x), torch.einsum("oqij,bij->boq", layer.weight, x) + layer.bias, **EXACT)


def test_embedding_is_a_row_of_its_table():
    table = fill(Embedding(5, 3))
    assert torch.equal(table(torch.tensor([[4, 0]])), table.weight[[4, 0]][None])


def test_rms_norm_divides_by_the_root_mean_square():
    norm, x = fill(make_norm(config.RMSNorm(eps=0.1), 8)), normal(3, 8)
    expected = torch.stack([row / math.sqrt(row.square().sum().item() / 8 + 0.1) * norm.weight for row in x])
    torch.testing.assert_close(norm(x), expected, **EXACT)


def test_an_offset_rms_norm_multiplies_by_one_more_than_its_weight():
    offset, plain = (fill(make_norm(config.RMSNorm(offset=flag), 8)) for flag in (True, False))
    plain.weight.data += 1
    torch.testing.assert_close(offset(normal(3, 8)), plain(normal(3, 8)), **EXACT)


def test_layer_norm_subtracts_the_mean_and_divides_by_the_deviation():
    norm, x = fill(make_norm(config.LayerNorm(eps=0.1), 8)), normal(3, 8)
    variance = ((x - x.mean(1, keepdim=True)) ** 2).sum(1, keepdim=True) / 8
    expected = (x - x.mean(1, keepdim=True)) / (variance + 0.1).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, **EXACT)


@pytest.mark.parametrize("part", [config.RMSNorm(), config.LayerNorm(), config.RMSNorm(offset=True)])
def test_norms_of_bf16_input_are_computed_in_fp32(part):
    norm = fill(make_norm(part, 64)).bfloat16()
    x = (normal(3, 64) * 100).bfloat16()
    wide = make_norm(part, 64)
    wide.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), wide(x.float()).bfloat16(), rtol=2**-8, atol=0)  # one bf16 rounding


def test_rope_turns_pair_i_by_position_times_its_frequency():
    x_BTHK, K = normal(1, 5, 2, 6), 6
    positions = torch.arange(3, 8)
    y_BTHK = rotate(x_BTHK, make_rotation(positions, K, theta=100.0, dtype=torch.float64))
    for t, position in enumerate(positions.tolist()):
        for i in range(K // 2):
            angle = position * 100.0 ** (-2 * i / K)
            a, b = x_BTHK[0, t, :, i], x_BTHK[0, t, :, i + K // 2]
            first, second = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
            torch.testing.assert_close(y_BTHK[0, t, :, i], first, **EXACT)
            torch.testing.assert_close(y_BTHK[0, t, :, i + K // 2], second, **EXACT)


def test_rope_scores_depend_on_the_distance_only():
    q, k = normal(1, 1, 1, 8, seed=1), normal(1, 1, 1, 8, seed=2)

    def score(query_position: int, key_position: int) -> Tensor:
        at_query, at_key = (
            make_rotation(torch.tensor([position]), 8, theta=1e4, dtype=torch.float64)
            for position in (query_position, key_position)
        )
        return (rotate(q, at_query) * rotate(k, at_key)).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), **EXACT)


def test_rope_of_bf16_heads_uses_fp32_angles():
    x = normal(1, 9, 1, 8).bfloat16()
    turned = rotate(x, make_rotation(torch.arange(1000, 1009), 8, theta=1e4, dtype=torch.float32))
    exact = rotate(x.double(), make_rotation(torch.arange(1000, 1009), 8, theta=1e4, dtype=torch.float64))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, exact.bfloat16(), rtol=2**-8, atol=1e-4)  # angles near 1000 in fp32: 6e-5


ACTIVATION_FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "squared_relu": lambda x: max(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas(name):
    x = normal(50)
    expected = torch.tensor([ACTIVATION_FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, **EXACT)


def test_dense_mlp_is_down_of_activation_of_up():
    mlp, x = fill(make_mlp(config.Dense(ffn_hidden_size=5, activation="relu", bias=True), 3)), normal(2, 4, 3)
    hidden = (x @ mlp.up.weight.T + mlp.up.bias).clamp(min=0)
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias, **EXACT)


def test_gated_mlp_activates_the_first_half_of_its_fused_weight():
    mlp, x = fill(make_mlp(config.Gated(ffn_hidden_size=5, bias=True), 3)), normal(2, 4, 3)
    gate, up = (x @ mlp.gate_up.weight[i].T + mlp.gate_up.bias[i] for i in (0, 1))
    expected = (gate * torch.sigmoid(gate) * up) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected, **EXACT)


def naive_attention(module: Attention, x_BTD: Tensor, theta: float) -> Tensor:
    """Grouped-query attention, one query at a time."""
    (B, T, _), (G, X, K, _) = x_BTD.shape, module.qkv.weight.shape
    R, y_BTD = X - 2, torch.zeros_like(x_BTD)
    angles_TL = torch.arange(T).double()[:, None] * theta ** (-torch.arange(0, K, 2).double() / K)

    def turn(head_TK: Tensor) -> Tensor:
        turned_TL = torch.complex(*head_TK.chunk(2, -1)) * torch.polar(torch.ones_like(angles_TL), angles_TL)
        return torch.cat((turned_TL.real, turned_TL.imag), -1)

    for b in range(B):
        for h in range(G * R):
            weight_XKD, bias_XK = module.qkv.weight[h // R], module.qkv.bias[h // R]
            q_TK, k_TK, v_TK = (x_BTD[b] @ weight_XKD[row].T + bias_XK[row] for row in (h % R, R, R + 1))
            q_TK, k_TK = turn(q_TK), turn(k_TK)
            for t in range(T):
                scores = (k_TK[: t + 1] @ q_TK[t]) / math.sqrt(K)
                mixed_K = (scores.exp() / scores.exp().sum()) @ v_TK[: t + 1]
                y_BTD[b, t] += module.out.weight[:, h] @ mixed_K
    return y_BTD + module.out.bias


@pytest.mark.parametrize("core", [eager, sdpa], ids=["eager", "sdpa"])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_heads_and_queries(core, num_kv_heads):
    gqa = tiny(attention=attention(num_kv_heads, qkv_bias=True, out_bias=True))
    module = fill(Attention(gqa, core))
    x_BTD = normal(2, 7, 16) / 4
    rotation = make_rotation(torch.arange(7), 6, theta=100.0, dtype=torch.float64)
    torch.testing.assert_close(module(x_BTD, rotation), naive_attention(module, x_BTD, 100.0), rtol=1e-11, atol=1e-11)
