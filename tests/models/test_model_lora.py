"""Low-rank adapters: what they add, their names, their fresh values, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from mt_core.config.trainable import is_trainable
from mt_models.canonical import canonical_state, load_canonical
from mt_models.config import GQA, MLA, Dense, Gated, GPTConfig, LayerNorm, Learned, MoE, RMSNorm, Rope
from mt_models.config.lora import ADAPTERS

GATED = ("q", "k", "v", "out", "gate", "up", "down")
DENSE = ("q", "k", "v", "out", "up", "down")


def make_config(targets: tuple[str, ...] = GATED, **changes: object) -> GPTConfig:
    values = {
        "layers": 2,
        "hidden_size": 24,
        "vocab_size": 40,
        "max_seq_len": 16,
        "attention": GQA(heads=6, num_kv_heads=2, head_size=6),
        "mlp": Gated(ffn_hidden_size=20) if "gate" in targets else Dense(ffn_hidden_size=20, bias=True),
        "norm": RMSNorm() if "gate" in targets else LayerNorm(),
        "position": Rope() if "gate" in targets else Learned(),
        "lora": {"rank": 3, "alpha": 7.0, "targets": targets},
    }
    return GPTConfig.model_validate(values | changes)


@pytest.fixture(params=[GATED, DENSE], ids=["gated", "dense"])
def model(request, monkeypatch):
    """A model in fp64 whose B are not zero."""
    config = make_config(request.param)
    model = config.build().double()
    model.initialize(3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def test_a_model_with_adapters_computes_what_its_merged_weights_do(model):
    tensors = canonical_state(model)
    lora = model.config.lora
    merged = model.config.model_copy(update={"lora": None}).build().double()
    weights = {}
    for name, tensor in tensors.items():
        if is_trainable(name, [ADAPTERS]):
            continue
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" in tensors:
            tensor = tensor + lora.scale * tensors[f"{module}.lora_b.weight"] @ tensors[f"{module}.lora_a.weight"]
        weights[name] = tensor
    load_canonical(merged, weights.__getitem__)
    tokens_BT = torch.arange(30).view(2, 15)
    torch.testing.assert_close(model(tokens_BT), merged(tokens_BT), rtol=1e-12, atol=1e-12)
    fresh = model.config.model_copy(update={"lora": None}).build().double()
    fresh.initialize(3)
    assert not torch.allclose(model(tokens_BT), fresh(tokens_BT))


def test_a_fresh_adapter_changes_nothing():
    config = make_config()
    model, plain = config.build(), config.model_copy(update={"lora": None}).build()
    model.initialize(3)
    plain.initialize(3)
    tokens_BT = torch.arange(30).view(2, 15)
    logits = [each.double()(tokens_BT) for each in (model, plain)]
    torch.testing.assert_close(*logits, rtol=1e-13, atol=1e-15)  # a product's order may depend on where its factors lie


def test_names_and_shapes_are_those_of_the_projections(model):
    lora, names = model.config.lora, {}
    for name, shape in model.config.canonical_shapes().items():
        if is_trainable(name, [ADAPTERS]):
            names[name] = shape
    plain = model.config.model_copy(update={"lora": None}).canonical_shapes()
    expected = {}
    for target in lora.targets:
        for layer in range(2):
            module = f"layers.{layer}.{'attn' if target in ('q', 'k', 'v', 'out') else 'mlp'}.{target}"
            out, into = plain[f"{module}.weight"]
            expected |= {f"{module}.lora_a.weight": (3, into), f"{module}.lora_b.weight": (out, 3)}
    assert names == expected
    assert {name: tuple(t.shape) for name, t in canonical_state(model).items()} == model.config.canonical_shapes()


def test_a_is_drawn_as_peft_draws_it():
    model = make_config(hidden_size=4096, layers=1).build()
    a = model.initial(1, "layers.0.attn.q.lora_a.weight")
    assert a.abs().max() <= 1 / 64
    assert a.std() == pytest.approx(1 / 64 / 3**0.5, rel=0.02)
    assert not model.initial(1, "layers.0.attn.q.lora_b.weight").any()


MLA_PART = MLA(heads=2, q_lora_rank=None, kv_lora_rank=4, nope_head_size=4, rope_head_size=4, v_head_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": MLA_PART}, "lora has no adapters for attention.kind = 'mla'"),
        ({"mlp": MoE(ffn_hidden_size=8, experts=3, top_k=2)}, "lora has no adapters for mlp.kind = 'moe'"),
        ({"mlp": Dense(ffn_hidden_size=8)}, r"lora.targets \['gate'\]: the model's blocks have q, k, v, out, up, down"),
        ({"lora": {"rank": 2, "alpha": 1, "targets": ["q", "q"]}}, "name at least one projection, each once"),
        ({"lora": {"rank": 2, "alpha": 1, "targets": []}}, "name at least one projection, each once"),
    ],
)
def test_what_cannot_be_adapted_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make_config(**changes)
