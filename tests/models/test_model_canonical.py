"""Parameters to canonical tensors and back, bit for bit, and how a bad stream is refused."""

import pytest
import torch

from models.parts import COMBINATIONS, attention, tiny
from mt_core.errors import MtError
from mt_models.canonical import canonical_state, list_stored, load_canonical, load_stream


def random_like_parameters(model, dtype):
    """A tensor for each parameter and stored buffer, with the zero padding rows that optimizer moments have."""
    source = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(p.shape, generator=source).to(dtype) for name, p in list_stored(model)}
    for name in tensors.keys() & {"embed.weight", "head.weight"}:
        tensors[name][model.config.vocab_size :] = 0
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_round_trip_is_bit_exact_and_has_the_declared_names_and_shapes(config, dtype):
    with torch.device("meta"):
        model = config.build()
    tensors = random_like_parameters(model, dtype)
    canonical = [pair for name, tensor in tensors.items() for pair in model.to_canonical(name, tensor)]
    assert {name: tuple(t.shape) for name, t in canonical} == config.canonical_shapes()
    assert len(canonical) == len(config.canonical_shapes())
    for name, tensor in tensors.items():
        back = model.from_canonical(name, dict(canonical).__getitem__)
        assert back.dtype == dtype
        assert torch.equal(back, tensor), name


def test_queries_of_a_group_lie_before_its_key_and_value(make_model):
    model = make_model(tiny(attention=attention(2, qkv_bias=True)))
    qkv_GXKD, state = model.layers["0"].attn.qkv.weight, canonical_state(model)
    q, k, v = (state[f"layers.0.attn.{p}.weight"] for p in "qkv")
    for group in range(2):
        rows = [q[12 * group : 12 * group + 6], q[12 * group + 6 : 12 * group + 12]]
        rows += [k[6 * group : 6 * group + 6], v[6 * group : 6 * group + 6]]
        assert torch.equal(qkv_GXKD[group], torch.stack(rows))


def test_a_tied_model_has_no_head(make_model):
    assert "head.weight" not in canonical_state(make_model(tiny(tied=True)))
    assert "head.weight" in canonical_state(make_model(tiny()))


@pytest.mark.parametrize("config", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_model_loads_another_ones_state(config, make_model, tokens_BT):
    source, by_name, by_stream = (make_model(config, seed=seed) for seed in (1, 2, 3))
    state = canonical_state(source)
    load_canonical(by_name, state.__getitem__)
    load_stream(by_stream, reversed(state.items()))
    for model in (by_name, by_stream):
        assert torch.equal(model(tokens_BT), source(tokens_BT))


def test_loading_keeps_the_models_dtype(make_model):
    model = make_model(tiny(), dtype=torch.bfloat16)
    load_stream(model, canonical_state(make_model(tiny(), seed=2)).items())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_everything_wrong_with_a_stream_is_reported_at_once(make_model):
    model = make_model(tiny())
    state = canonical_state(make_model(tiny()))
    norm = state.pop("norm.weight")
    state |= {"layers.2.attn.q.weight": torch.zeros(24, 16), "embed.weight": torch.zeros(38, 16)}
    with pytest.raises(MtError) as error:
        load_stream(model, [*state.items(), ("layers.0.attn_norm.weight", norm)])
    assert str(error.value).splitlines() == [
        "norm.weight: tensor is missing; shape (16,)",
        "embed.weight: tensor has shape (38, 16); the model needs (37, 16)",
        "layers.0.attn_norm.weight: duplicate tensor (2 copies); expected one",
        "layers.2.attn.q.weight: unexpected tensor of shape (24, 16); the model has no tensor of this name",
    ]


def test_an_empty_stream_misses_everything(make_model):
    with pytest.raises(MtError) as error:
        load_stream(make_model(tiny()), [])
    assert len(error.value.problems) == len(tiny().canonical_shapes())


def test_a_tensor_of_the_wrong_shape_is_never_broadcast_into_a_parameter(make_model):
    state = canonical_state(make_model(tiny())) | {"norm.weight": torch.ones(1)}
    with pytest.raises(AssertionError, match=r"norm.weight: \(1,\) is not \(16,\)"):
        load_canonical(make_model(tiny()), state.__getitem__)
