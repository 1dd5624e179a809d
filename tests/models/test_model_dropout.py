"""Dropout is where transformers and Megatron have it, needs a core that can do it, and ignores position ids."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from models.encoders import bert, t5
from models.parts import attention, tiny
from models.test_model_encoder_parity import BERT_NAMES, SIZES, T5_NAMES, loaded
from models.test_model_transformers_parity import gpt2_tensors
from models.theirs import randomised
from mt_core import plugins
from mt_core.errors import MtError
from mt_core.parallel.dropout import DropoutKeys, ProbabilityDropout, drop_features, fold, mask_probabilities
from mt_core.plugins import Component, hookimpl
from mt_core.training.seeds import make_sample_keys
from mt_models.canonical import load_stream
from mt_models.layers.attention_cores import Core, attend_eager, choose_core, eager, sdpa
from mt_models.layers.dropout import (
    ATTENTION,
    ATTENTION_OUTPUT,
    CROSS,
    CROSS_OUTPUT,
    DECODER_EMBEDDING,
    EMBEDDING,
    MLP_OUTPUT,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

RATES = {"attention": 0.2, "hidden": 0.1, "embedding": 0.1}
KEYS_B = make_sample_keys(3, 0, 3)
PASSED_OVER = None
"""A place where transformers drops and we do not."""


@pytest.fixture
def replay(monkeypatch) -> Callable[[list[tuple[int, int] | None]], None]:
    """Makes torch's dropout use our masks, of the layers and sites given, in the order in which it is called."""

    def start(sites: list[tuple[int, int] | None]) -> None:
        order: Iterator[tuple[int, int] | None] = iter(sites)

        def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            site = next(order)
            return x if site is PASSED_OVER else drop_as_ours(x, p, *site)

        monkeypatch.setattr(torch.nn.functional, "dropout", drop)

    return start


def drop_as_ours(x: Tensor, rate: float, layer: int, site: int) -> Tensor:
    """[B, T, D] features, or [B, H, T, S] probabilities, with our masks; layer 0 comes before the layers."""
    samples_B = fold(KEYS_B, layer)
    positions = [torch.arange(length, dtype=torch.int32) for length in x.shape]
    if x.dim() == 3:
        return drop_features(x, DropoutKeys(samples_B, positions[1]), rate, site)
    kept = mask_probabilities(ProbabilityDropout(rate, fold(samples_B, site), *positions[1:]))
    return x * kept / (1 - rate)


def blocks(first: int, count: int, *sites: int | None) -> list[tuple[int, int] | None]:
    return [site if site is None else (n, site) for n in range(first, first + count) for site in sites]


@torch.no_grad()
def test_gpt_drops_where_gpt_2_does(replay):
    rates = {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 40, "vocab_size": 99}
    config = transformers.GPT2Config(**sizes, **rates, layer_norm_epsilon=1e-3, attn_implementation="eager")
    theirs = randomised(transformers.GPT2LMHeadModel(config)).train()
    ours = tiny(
        hidden_size=32,
        vocab_size=99,
        max_seq_len=40,
        attention=attention(4, head_size=8, qkv_bias=True, out_bias=True),
        mlp={"kind": "dense", "ffn_hidden_size": 48, "activation": "gelu_tanh", "bias": True},
        norm={"kind": "layer", "eps": 1e-3},
        position={"kind": "learned"},
        tied=True,
        dropout=RATES,
    ).build()
    load_stream(ours, gpt2_tensors(theirs))
    tokens_BT = torch.randint(0, 99, (3, 30), generator=torch.Generator().manual_seed(1))
    dropout = ours.train().start_dropout(tokens_BT, KEYS_B)
    replay([(0, EMBEDDING), *blocks(1, 2, ATTENTION, ATTENTION_OUTPUT, MLP_OUTPUT)])
    expected = theirs(tokens_BT).logits
    torch.testing.assert_close(ours.logits(ours.hidden(tokens_BT, dropout=dropout)), expected, rtol=0, atol=3e-5)
    assert not torch.allclose(ours.eval()(tokens_BT), expected, atol=0.1)


@pytest.mark.parametrize("norm_place", ["before", "after"])
@torch.no_grad()
def test_bert_drops_where_transformers_berts_do(norm_place, replay):
    family = "Bert" if norm_place == "after" else "MegatronBert"
    rates = {"attention_probs_dropout_prob": 0.2, "hidden_dropout_prob": 0.1}
    config = getattr(transformers, f"{family}Config")(**SIZES, **rates, attn_implementation="eager")
    theirs = randomised(getattr(transformers, f"{family}ForPreTraining")(config)).train()
    ours = loaded(bert(norm_place=norm_place, dropout=RATES), theirs, BERT_NAMES).train()
    tokens_BT = torch.randint(0, 99, (3, 30), generator=torch.Generator().manual_seed(1))
    replay([(0, EMBEDDING), *blocks(1, 2, ATTENTION, ATTENTION_OUTPUT, MLP_OUTPUT)])
    expected = theirs.bert(tokens_BT).last_hidden_state
    torch.testing.assert_close(ours.hidden(tokens_BT, dropout_keys_B=KEYS_B), expected, rtol=0, atol=3e-5)
    assert not torch.allclose(ours.eval().hidden(tokens_BT), expected, atol=0.1)


@torch.no_grad()
def test_t5_drops_where_transformers_does_but_inside_feed_forward_layers_and_after_a_stack(replay):
    sizes = {"vocab_size": 99, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_heads": 4}
    buckets = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    layers = {"num_layers": 2, "num_decoder_layers": 3, "layer_norm_epsilon": 1e-3}
    more = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "attn_implementation": "eager"}
    config = transformers.T5Config(**sizes, **buckets, **layers, **more, dropout_rate=0.1)
    theirs = randomised(transformers.T5ForConditionalGeneration(config)).train()
    ours = loaded(t5(dropout=RATES | {"attention": 0.1}), theirs, T5_NAMES).train()
    tokens_BS = torch.randint(0, 99, (3, 30), generator=torch.Generator().manual_seed(1))
    target_BT = tokens_BS.flip(1)[:, :17]
    encoder = blocks(1, 2, ATTENTION, ATTENTION_OUTPUT, PASSED_OVER, MLP_OUTPUT)
    decoder = blocks(3, 3, ATTENTION, ATTENTION_OUTPUT, CROSS, CROSS_OUTPUT, PASSED_OVER, MLP_OUTPUT)
    replay([(0, EMBEDDING), *encoder, PASSED_OVER, (0, DECODER_EMBEDDING), *decoder, PASSED_OVER])
    expected = theirs(input_ids=tokens_BS, decoder_input_ids=target_BT).logits
    decoded = ours.decode(target_BT, ours.encode(tokens_BS, dropout_keys_B=KEYS_B), dropout_keys_B=KEYS_B)
    torch.testing.assert_close(ours.logits(decoded), expected, rtol=0, atol=1e-4)


def test_sdpa_drops_as_attention_written_out_does():
    source = torch.Generator().manual_seed(0)
    q_BTHK, k_BSGK, v_BSGK = (torch.randn(3, 9, heads, 8, generator=source, dtype=torch.float64) for heads in (6, 2, 2))
    positions = [torch.arange(length, dtype=torch.int32) for length in (6, 9, 9)]
    dropout = ProbabilityDropout(0.3, KEYS_B, *positions)
    one, other = (core(q_BTHK, k_BSGK, v_BSGK, dropout=dropout) for core in (sdpa, eager))
    assert torch.equal(one, other)
    assert not torch.allclose(one, sdpa(q_BTHK, k_BSGK, v_BSGK))


def test_documents_that_restart_positions_do_not_restart_masks():
    model = tiny(position={"kind": "none"}, dropout=RATES).build().double()
    model.initialize(1)
    tokens_BT = torch.randint(0, 37, (3, 16), generator=torch.Generator().manual_seed(5))
    restarted_T = torch.arange(16) % 5
    plain, packed = (
        model.token_losses(tokens_BT, tokens_BT, dropout_keys_B=KEYS_B, positions=positions)
        for positions in (None, restarted_T)
    )
    assert torch.equal(plain, packed)


@pytest.mark.parametrize("rate", ["attention", "hidden", "embedding"])
def test_training_without_keys_is_refused_instead_of_dropping_nothing(rate):
    model = tiny(dropout={rate: 0.1}).build()
    with pytest.raises(MtError, match=r"model.dropout: is on, but the batch has no 'dropout_keys'"):
        model.losses(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(MtError, match=r"or model.eval\(\)"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_rate_is_a_share_below_one(rate):
    with pytest.raises(ValueError, match="dropout.hidden"):
        tiny(dropout={"hidden": rate})


undropping = Core(attend_eager, preference=99)


@pytest.fixture
def third_party():
    """A plugin whose core is the fastest, and knows nothing of dropout."""
    components = [Component("attention", "swift", f"{__name__}:undropping", "fast")]
    plugin = SimpleNamespace(mt_components=hookimpl(lambda: components))
    plugins.manager().register(plugin)
    yield
    plugins.manager().unregister(plugin)


@pytest.mark.usefixtures("third_party")
def test_a_core_that_cannot_drop_is_not_chosen_and_refused_by_name():
    cpu = torch.device("cpu")
    assert choose_core("auto", cpu) is undropping
    assert choose_core("auto", cpu, frozenset({"dropout"})) is sdpa
    tiny(attention=attention(core="swift"), dropout={"hidden": 0.1}).build()
    with pytest.raises(MtError, match="core 'swift': cannot run on cpu: has no dropout; use \"auto\""):
        tiny(attention=attention(core="swift"), dropout={"attention": 0.1}).build()
