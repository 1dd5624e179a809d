"""BERT, post- and pre-normalised, and T5 equal transformers' models for the same weights, tiny and random, in fp32."""

import pytest
import torch

from models.encoders import T5, bert, t5
from models.theirs import randomised, renamed
from mt_models.canonical import load_stream

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CLOSE = {"rtol": 0, "atol": 1e-5}
BERT_NAMES = {
    "bert.": "",
    "encoder.layer.": "layers.",
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "position",
    "embeddings.token_type_embeddings": "token_type",
    "embeddings.LayerNorm": "embed_norm",
    "attention.self.query": "attn.q",
    "attention.self.key": "attn.k",
    "attention.self.value": "attn.v",
    "attention.output.dense": "attn.out",
    "attention.output.LayerNorm": "attn_norm",
    "attention.ln": "attn_norm",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "output.LayerNorm": "mlp_norm",
    "encoder.ln": "norm",
    ".ln.": ".mlp_norm.",
    "pooler.dense": "pooler",
    "cls.predictions.transform.dense": "lm_head.dense",
    "cls.predictions.transform.LayerNorm": "lm_head.norm",
    "cls.predictions.bias": "head.bias",
    "cls.seq_relationship": "binary_head",
}
T5_NAMES = {
    **{f"encoder.block.{n}.layer.1.layer_norm": f"encoder.layers.{n}.mlp_norm" for n in range(2)},
    "shared": "embed",
    "lm_head": "head",
    "layer.0.SelfAttention.relative_attention_bias": "relative",
    ".block.0.relative": ".relative",
    "block": "layers",
    "layer.0.SelfAttention": "attn",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.EncDecAttention": "cross",
    "layer.1.layer_norm": "cross_norm",
    "layer.2.layer_norm": "mlp_norm",
    "layer.1.DenseReluDense": "mlp",
    "layer.2.DenseReluDense": "mlp",
    "wi_0": "gate",
    "wi_1": "up",
    "mlp.wi": "mlp.up",
    "mlp.wo": "mlp.down",
    "final_layer_norm": "norm",
    ".o.": ".out.",
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-3,
}


@pytest.fixture
def text() -> dict[str, torch.Tensor]:
    """Tokens, types and a padding mask, in transformers' words."""
    source = torch.Generator().manual_seed(1)
    mask = torch.ones(3, 30, dtype=torch.int64)
    mask[1, 20:], mask[2, 5:] = 0, 0
    return {
        "input_ids": torch.randint(0, 99, (3, 30), generator=source),
        "token_type_ids": torch.randint(0, 2, (3, 30), generator=source),
        "attention_mask": mask,
    }


def loaded(config, theirs, names, *, without=()):
    """Our model with the weights of theirs, each tensor used once."""
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "embed_tokens.weight")
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith(tied) and "position_ids" not in k}
    model = config.build()
    load_stream(model, ((renamed(k, names), v) for k, v in state.items() if k not in without))
    return model.eval()


@pytest.mark.parametrize("norm_place", ["before", "after"])
@torch.no_grad()
def test_bert_s_features_and_the_logits_of_both_heads(norm_place, text):
    family = "Bert" if norm_place == "after" else "MegatronBert"
    theirs = getattr(transformers, f"{family}ForPreTraining")(getattr(transformers, f"{family}Config")(**SIZES))
    theirs = randomised(theirs)
    ours = loaded(bert(norm_place=norm_place), theirs, BERT_NAMES)
    expected = theirs(**text, output_hidden_states=True)
    features = ours.hidden(text["input_ids"], text["token_type_ids"], text["attention_mask"])
    words = text["attention_mask"].bool()
    torch.testing.assert_close(features, theirs.bert(**text).last_hidden_state, **CLOSE)
    torch.testing.assert_close(ours.logits(features)[words], expected.prediction_logits[words], rtol=0, atol=3e-5)
    torch.testing.assert_close(ours.nsp_logits(features), expected.seq_relationship_logits, **CLOSE)


@torch.no_grad()
def test_an_encoder_without_heads_gives_the_features_of_every_token(text):
    theirs = randomised(transformers.BertModel(transformers.BertConfig(**SIZES), add_pooling_layer=False))
    config = bert(norm_place="after", lm_head=False, pooler=False, binary_head=False)
    ours = loaded(config, theirs, BERT_NAMES)
    features = ours(text["input_ids"], text["token_type_ids"], text["attention_mask"])
    torch.testing.assert_close(features, theirs(**text).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("original", [False, True], ids=["v1.1", "original"])
@torch.no_grad()
def test_t5_s_logits(original, text):
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=99,
            d_model=32,
            d_kv=6,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=3,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            layer_norm_epsilon=1e-3,
            feed_forward_proj="relu" if original else "gated-gelu",
            tie_word_embeddings=original,
        )
    )
    theirs = randomised(theirs)
    mlp = {"kind": "dense", "ffn_hidden_size": 48, "activation": "relu"} if original else T5["mlp"]
    ours = loaded(
        t5(mlp=mlp, tied=original, scaled_head=original),
        theirs,
        T5_NAMES,
        without=["lm_head.weight"] if original else [],
    )
    target = text["input_ids"].flip(1)[:, :17]
    expected = theirs(
        input_ids=text["input_ids"], attention_mask=text["attention_mask"], decoder_input_ids=target
    ).logits
    torch.testing.assert_close(ours(text["input_ids"], target, text["attention_mask"]), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_distance_up_to_two_hundred_is_in_transformers_bucket(bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    from mt_models.config import Relative
    from mt_models.layers.relative_bias import bucket

    distances = torch.arange(-200, 201)
    theirs = T5Attention._relative_position_bucket(distances, bidirectional, num_buckets=32, max_distance=128)
    assert torch.equal(bucket(distances, Relative(), bidirectional=bidirectional), theirs)
