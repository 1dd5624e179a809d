"""Decoding with the KV cache gives the logits of a full pass, however the tokens are cut into chunks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.parts import COMBINATIONS, LATENT, attention, tiny
from mt_core.errors import MtError
from mt_models.layers.kv_cache import KVCache

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@torch.no_grad()
def in_chunks(model, tokens_BT, sizes):
    cache = model.make_cache(len(tokens_BT), tokens_BT.shape[1])
    return torch.cat([model(chunk, cache) for chunk in tokens_BT.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if "-groups-" in name or "latent" in name])
def test_prefill_then_one_token_at_a_time(name, make_model, tokens_BT):
    model = make_model(COMBINATIONS[name])
    torch.testing.assert_close(in_chunks(model, tokens_BT, [5, *[1] * 7]), model(tokens_BT), **EXACT)


@pytest.mark.parametrize("attention", [attention(), LATENT], ids=["gqa", "mla"])
@pytest.mark.parametrize("core", ["eager", "sdpa"])
@given(cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_chunks(core, attention, cuts, make_model, tokens_BT):
    model = make_model(tiny(attention=attention | {"core": core}))
    edges = [0, *sorted(cuts), 12]
    sizes = [end - start for start, end in pairwise(edges)]
    torch.testing.assert_close(in_chunks(model, tokens_BT, sizes), model(tokens_BT), **EXACT)


def test_length_counts_the_positions_stored(make_model, tokens_BT):
    model = make_model(tiny())
    cache = model.make_cache(2, 12)
    lengths = [cache.length]
    for chunk in tokens_BT.split([4, 7, 1], dim=1):
        model(chunk, cache)
        lengths.append(cache.length)
    assert lengths == [0, 4, 11, 12]


def test_a_cache_is_preallocated_by_group_in_the_models_dtype(make_model):
    layers = make_model(tiny(), dtype=torch.bfloat16).make_cache(3, 8).layers
    assert [(layer.k_BSGK.shape, layer.v_BSGK.dtype) for layer in layers] == [((3, 8, 2, 6), torch.bfloat16)] * 2


def test_a_cache_of_latent_attention_holds_latents_and_the_shared_rotary_features(make_model):
    (layer, _) = make_model(COMBINATIONS["latent"]).make_cache(3, 8).layers
    assert (layer.k_BSGK.shape, layer.v_BSGK.shape) == ((3, 8, 8), (3, 8, 4))


def test_more_tokens_than_the_cache_holds_is_an_error(make_model, tokens_BT):
    model = make_model(tiny())
    cache = KVCache(model.config, 2, positions=11, dtype=torch.float64)
    with pytest.raises(MtError, match="KV cache: 12 positions do not fit; it was made for 11"):
        model(tokens_BT, cache)


def test_more_positions_than_the_model_has_is_an_error(make_model, tokens_BT):
    model = make_model(tiny())
    cache = model.make_cache(2, 100)
    model(tokens_BT, cache)
    with pytest.raises(MtError, match=r"a sequence of 24 tokens; at most model\.max_seq_len = 16"):
        model(tokens_BT, cache)
