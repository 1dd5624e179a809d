"""Decoding with the paged KV cache gives the logits of a full pass, however the tokens are cut into passes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval.generation.families import make_family
from models.parts import COMBINATIONS, LATENT, attention, tiny
from mt_core.errors import MtError
from mt_models.layers.kv_cache import Span

EXACT = {"rtol": 1e-12, "atol": 1e-12}
TABLES = ([3, 1, 5], [2, 7, 4])
"""Blocks of two sequences, of 4 tokens each."""
WINDOWS = {
    "window": tiny(attention=attention(window=5)),
    "window-of-some-layers": tiny(attention=attention(window=5, window_layers=(True, False), softcap=9.0, scale=0.3)),
}


@torch.no_grad()
def in_passes(model, tokens_BT, sizes, cache=None):
    """Logits of two sequences that advance together by so many tokens a pass."""
    cache = cache or model.eval().make_cache(8, 4)
    parts, start = [], 0
    for chunk_BT in tokens_BT.split(sizes, dim=1):
        spans = [Span(start, chunk_BT.shape[1], table) for table in TABLES]
        parts.append(model(chunk_BT.reshape(-1, 1), cache.place(spans)).view(*chunk_BT.shape, -1))
        start += chunk_BT.shape[1]
    return torch.cat(parts, dim=1)


CASES = {name: config for name, config in COMBINATIONS.items() if "-groups-" in name or "latent" in name} | WINDOWS


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_prefill_then_one_token_at_a_time(name, exact, make_model, tokens_BT):
    model = make_model(CASES[name]).eval()
    cache = model.make_cache(8, 4)
    cache.exact = exact
    torch.testing.assert_close(in_passes(model, tokens_BT, [5, *[1] * 7], cache), model(tokens_BT), **EXACT)


@pytest.mark.parametrize("attention", [attention(), LATENT], ids=["gqa", "mla"])
@given(cuts=st.sets(st.integers(1, 11)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_passes(attention, cuts, make_model, tokens_BT):
    model = make_model(tiny(attention=attention))
    sizes = [end - start for start, end in pairwise([0, *sorted(cuts), 12])]
    torch.testing.assert_close(in_passes(model, tokens_BT, sizes), model(tokens_BT), **EXACT)


def test_sequences_longer_than_a_tile_of_keys(make_model):
    """Keys before a window are left out by whole tiles, of 128."""
    tokens_BT = torch.randint(0, 37, (2, 300), generator=torch.Generator().manual_seed(5))
    for window in (None, 20):
        model = make_model(tiny(attention=attention(window=window), max_seq_len=512)).eval()
        cache, tables = model.make_cache(40, 16), [[*range(1, 20)], [*range(20, 39)]]
        with torch.no_grad():
            for start, count in ((0, 290), (290, 9), (299, 1)):
                spans = [Span(start, count, table) for table in tables]
                logits = model(tokens_BT[:, start : start + count].reshape(-1, 1), cache.place(spans))
            torch.testing.assert_close(logits[:, 0], model(tokens_BT)[:, -1], **EXACT)


def test_sequences_of_different_lengths_share_a_pass(make_model, tokens_BT):
    model = make_model(tiny()).eval()
    cache, ((first, second), whole) = model.make_cache(8, 4), (tokens_BT, model(tokens_BT))
    with torch.no_grad():
        model(first[:7, None], cache.place([Span(0, 7, TABLES[0])]))
        rows = torch.cat((first[7:8], second[:5]))[:, None]
        logits = model(rows, cache.place([Span(7, 1, TABLES[0]), Span(0, 5, TABLES[1])]))[:, 0]
    torch.testing.assert_close(logits, torch.cat((whole[0, 7:8], whole[1, :5])), **EXACT)


def test_a_cache_is_blocks_of_groups_in_the_models_dtype(make_model):
    cache = make_model(tiny(), dtype=torch.bfloat16).make_cache(3, 8)
    assert (cache.k.shape, cache.v.shape, cache.v.dtype) == ((2, 2, 3, 8, 6), (2, 2, 3, 8, 6), torch.bfloat16)
    assert cache.nbytes == 2 * 2 * 2 * 3 * 8 * 6 * 2


def test_a_cache_of_latent_attention_holds_latents_and_the_shared_rotary_features_once(make_model):
    cache = make_model(COMBINATIONS["latent"]).make_cache(3, 8)
    assert (cache.k.shape, cache.v) == ((2, 1, 3, 8, 12), None)


def test_what_a_block_had_does_not_reach_its_next_owner_once_cleared(make_model, tokens_BT):
    model = make_model(tiny()).eval()
    cache = model.make_cache(8, 4)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    cache.clear([0, *TABLES[0], *TABLES[1]])
    torch.testing.assert_close(in_passes(model, tokens_BT, [5, 7], cache), model(tokens_BT), **EXACT)


def test_a_copied_block_is_another_sequences_own(make_model, tokens_BT):
    model = make_model(tiny()).eval()
    cache, first = model.make_cache(8, 4), tokens_BT[0]
    with torch.no_grad():
        model(first[:6, None], cache.place([Span(0, 6, [3, 1])]))
        cache.copy([1], [5])
        model(first[:1, None], cache.place([Span(6, 1, [3, 1])]))
        logits = model(first[6:8, None], cache.place([Span(6, 2, [3, 5])]))[:, 0]
    torch.testing.assert_close(logits, model(tokens_BT)[0, 6:8], **EXACT)


def test_more_positions_than_the_model_has_is_an_error(make_model):
    model = make_model(tiny()).eval()
    cache = model.make_cache(8, 4)
    with pytest.raises(MtError, match=r"a sequence of 17 tokens; at most model\.max_seq_len = 16"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache.place([Span(16, 1, [1, 2, 3, 4, 5])]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "mla"])
def test_prompts_that_need_not_be_exact_are_computed_together(name):
    """Whole ones by a fused core, others behind what the cache has; as on a GPU."""
    model, results = make_family(name), []
    draw = torch.Generator().manual_seed(0)
    tokens_N1 = torch.randint(97, (36, 1), generator=draw)
    tables = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    for exact in (True, False):
        cache = model.make_cache(13, 4)
        cache.exact = exact
        parts = []
        for start, tokens in ((0, 5), (5, 3), (8, 1)):  # whole prompts, a part of each, a token of each
            spans = [Span(start, tokens, table) for table in tables]
            step = cache.place(spans)
            assert exact or len(step.groups) == 1
            with torch.inference_mode():
                parts.append(model.hidden(tokens_N1[4 * start : 4 * (start + tokens)], cache=step))
        results.append(torch.cat(parts))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-5)
