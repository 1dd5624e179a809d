"""Initial weights depend on the seed and the canonical name, and on nothing else."""

import math

import pytest
import torch

from models.parts import COMBINATIONS, GATED, LEARNED, MOE, attention, tiny
from mt_models.canonical import canonical_state
from mt_models.initialization import initial


@pytest.mark.parametrize("config", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_canonical_tensor_has_its_initial_value(config, make_model):
    state = canonical_state(make_model(config, seed=7))
    assert state.keys() == config.canonical_shapes().keys()
    for name, shape in config.canonical_shapes().items():
        assert torch.equal(state[name], initial(config, 7, name=name, shape=shape).double()), name


def test_no_two_tensors_are_alike(make_model):
    drawn = [t.flatten()[:8] for name, t in canonical_state(make_model(tiny())).items() if "norm" not in name]
    assert len({tuple(t.tolist()) for t in drawn}) == len(drawn) == 2 + 2 * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_differ_by_rounding_only(dtype, make_model):
    wide, narrow = (canonical_state(make_model(tiny(), dtype=d)) for d in (torch.float64, dtype))
    for name in wide:
        assert torch.equal(wide[name].to(dtype), narrow[name]), name


def test_padding_changes_no_value_and_is_zero(make_model):
    padded, plain = (make_model(tiny(vocab_divisor=divisor)) for divisor in (128, 1))
    for name, tensor in canonical_state(plain).items():
        assert torch.equal(tensor, canonical_state(padded)[name]), name
    assert not padded.embed.weight[37:].any()
    assert not padded.head.weight[37:].any()


def test_a_model_built_on_meta_gets_the_same_values(make_model):
    with torch.device("meta"):
        model = tiny(position=LEARNED).build().double()
    model.to_empty(device="cpu").initialize(1)
    expected = canonical_state(make_model(tiny(position=LEARNED)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in canonical_state(model).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_a_gpu_gets_the_same_values(make_model):
    with torch.device("cuda"):
        model = tiny().build()
        model.initialize(1)
    expected = canonical_state(make_model(tiny(), dtype=torch.float32))
    assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in canonical_state(model).items())


def test_global_random_state_plays_no_part(make_model):
    torch.manual_seed(0)
    first = make_model(tiny()).embed.weight
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, make_model(tiny()).embed.weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_differ(make_model):
    assert not torch.equal(make_model(tiny(), seed=1).embed.weight, make_model(tiny(), seed=2).embed.weight)


def test_weights_have_the_standard_deviations_of_the_specification():
    config = tiny(layers=8, hidden_size=256, mlp=GATED | {"ffn_hidden_size": 512}, attention=attention(head_size=64))
    for name, shape in config.canonical_shapes().items():
        tensor = initial(config, 3, name=name, shape=shape)
        if "norm" in name:
            assert (tensor == 1).all()
            continue
        std = 0.3 / (math.sqrt(16) if name.endswith(("out.weight", "down.weight")) else 1)
        five_sigmas = 5 / math.sqrt(2 * tensor.numel())
        assert tensor.std().item() == pytest.approx(std, rel=five_sigmas), name
        assert abs(tensor.mean().item()) < 5 * std / math.sqrt(tensor.numel()), name


def test_biases_are_zero_and_norm_weights_one(make_model):
    config = COMBINATIONS["2-groups-gated-layer-learned-bias-tied"]
    state = canonical_state(make_model(config))
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith("bias"))
    assert all((tensor == 1).all() for name, tensor in state.items() if name.endswith("norm.weight"))


def test_values_stay_the_same_from_version_to_version():
    # Printed by `initial(...)` itself when it was written; torch's vector units may differ in the last bit.
    tensor = initial(tiny(), 1234, name="layers.0.attn.q.weight", shape=(24, 16))
    golden = torch.tensor([0.653575301, 0.351286769, 0.295261055, 0.477787107])
    torch.testing.assert_close(tensor[0, :4], golden, rtol=1e-6, atol=0)


def test_offset_norms_start_at_zero_and_so_change_nothing(make_model):
    state = canonical_state(make_model(tiny(norm={"kind": "rms", "offset": True}, post_norms=True)))
    norms = {name: tensor for name, tensor in state.items() if "norm" in name}
    assert len(norms) == 2 * 4 + 1
    assert not any(tensor.any() for tensor in norms.values())


def test_experts_down_projections_lead_into_the_residual_stream():
    config = tiny(layers=8, hidden_size=64, mlp=MOE | {"ffn_hidden_size": 128})
    for part, std in (("up", 0.3), ("down", 0.3 / 4)):
        name = f"layers.0.mlp.experts.{part}.weight"
        tensor = initial(config, 3, name=name, shape=config.canonical_shapes()[name])
        assert tensor.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * tensor.numel())), name
