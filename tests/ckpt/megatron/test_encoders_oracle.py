"""megatron-core itself loads our BERT and T5, and computes what we compute, fp32, on one and two tensor ranks.

It runs as in test_megatron_oracle.py. Its own attention takes no relative biases without Transformer Engine: there the
T5 that has them gets a core of ours in its self-attention, and everything else is theirs.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ckpt.megatron.legacy.legacy_checkpoints import random_weights
from ckpt.megatron.test_encoders import BERT, PLAIN_BERT, RELATIVE_T5, T5
from ckpt.megatron.test_oracle import without_cuda
from mt_ckpt.megatron.args.model_types import model_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.distributed.mesh import Axis
from mt_core.verification.ranks import run_ranks
from mt_models.canonical import load_stream

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]

CASES: dict[str, Any] = {
    name: config.model_copy(update={"vocab_size": 64})
    for name, config in {
        "bert": BERT,
        "plain bert": PLAIN_BERT,
        "t5": T5.model_copy(update={"final_norm": False}),
        "relative t5": RELATIVE_T5,
    }.items()
}
"""Their T5 is made of blocks, which have no final norm, or as in older releases of layers, to which one is added."""
SAVED = ("bert", "t5")
"""What megatron-core also saves, which takes it a second each."""
TOKENS_BT = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
TYPES_BT = (torch.arange(12) > 5).long().expand_as(TOKENS_BT)
READ_BS = TOKENS_BT.flip(1)


def their_config(axis: Axis, config: Any, layers: int, stages: int = 1) -> Any:
    from megatron.core.transformer import TransformerConfig

    gated, tanh = config.mlp.kind == "gated", config.mlp.activation == "gelu_tanh"
    return TransformerConfig(
        num_layers=layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.attention.heads,
        kv_channels=config.attention.head_size,
        ffn_hidden_size=config.mlp.ffn_hidden_size,
        normalization="RMSNorm" if config.norm.kind == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm.eps,
        add_bias_linear=config.mlp.bias,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else F.gelu,
        bias_activation_fusion=tanh,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=axis.size,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
    )


def their_bert(axis: Axis, config: Any) -> Any:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    return BertModel(
        their_config(axis, config, config.layers),
        num_tokentypes=config.token_types,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        share_embeddings_and_output_weights=True,
        add_binary_head=config.binary_head,
    )


class Biased(nn.Module):
    """softmax(q·k / sqrt(K) + bias) · v over [sequence, batch, heads, K], as their attention calls its core."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Any, attention_bias: Any, **__: Any) -> Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        bias = attention_bias.masked_fill(mask, float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return y.permute(2, 0, 1, 3).flatten(2)


def their_t5(axis: Axis, config: Any, stages: tuple[int, int] = (1, 1), **piece: bool) -> Any:
    """Their T5, or a piece of it, whose encoder and decoder have so many pipeline stages."""
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    if config.final_norm:
        encoder, decoder = t5_spec.encoder_model_with_local_spec(), t5_spec.decoder_model_with_local_spec()
    else:
        encoder = t5_spec.get_t5_encoder_with_local_block_spec(config.layers // stages[0])
        decoder = t5_spec.get_t5_decoder_with_local_block_spec(config.decoder_layers // stages[1])
    relative = config.position.kind == "relative"
    if relative:
        for spec in (encoder, decoder):
            spec.submodules.self_attention.submodules.core_attention = Biased
    more = {} if not relative else {
        "relative_attention_num_buckets": config.position.buckets,
        "relative_attention_max_distance": config.position.max_distance,
    }  # fmt: skip
    return T5Model(
        their_config(axis, config, config.decoder_layers, stages[1]),
        their_config(axis, config, config.layers, stages[0]),
        encoder,
        decoder,
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        share_embeddings_and_output_weights=config.tied,
        position_embedding_type="relative" if relative else "learned_absolute",
        **more,
        **piece,
    )


def compute_their_logits(model: Any, config: Any) -> list[Tensor]:
    """Logits of the language-model head, this rank's share, and of BERT's binary head."""
    if config.kind == "bert":
        types = TYPES_BT if config.token_types else None
        logits, binary = model(TOKENS_BT, torch.ones_like(TOKENS_BT), tokentype_ids=types)
        return [logits] if binary is None else [logits, binary]
    seen, future = torch.zeros(2, 1, 12, 12) > 0, (torch.ones(12, 12).triu(1) > 0).expand(2, 1, 12, 12)
    return [model(READ_BS, TOKENS_BT, seen, future, seen)]


@torch.no_grad()
def our_logits(loader: MegatronCoreLoader) -> list[Tensor]:
    config = loader.config()
    model: Any = config.build()
    load_stream(model, loader.tensors())
    if config.kind == "t5":
        return [model(READ_BS, TOKENS_BT)]
    x_BTD = model.hidden(TOKENS_BT, TYPES_BT)
    return [model.logits(x_BTD), *([model.nsp_logits(x_BTD)] if config.binary_head else [])]


@torch.no_grad()
def exchange(axis: Axis, room: Path) -> dict[str, Any]:
    """Load ours, compute and save; the logits of this rank, and names and shapes of its state."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron

    initialize_megatron(axis)
    without_cuda()
    answers: dict[str, Any] = {}
    for case, config in CASES.items():
        model = {"bert": their_bert, "t5": their_t5}[config.kind](axis, config)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(room / case / "ours" / "release"))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        shapes = {name: getattr(value, "shape", None) for name, value in model.state_dict().items()}
        logits = [share.tolist() for share in compute_their_logits(model.eval(), config)]
        answers[case] = logits, {name: shape and tuple(shape) for name, shape in shapes.items()}
        if case in SAVED:
            args = model_args(config, Layout(axis.size, 1, 1, engine=False), dtype=torch.float32, form="torch_dist")
            directory = room / case / f"theirs-{axis.size}"
            directory.mkdir(exist_ok=True)
            dist_checkpointing.save({**model.sharded_state_dict(), "args": args}, str(directory))
    return answers


@cache
def room() -> Path:
    """Our checkpoints of every case."""
    path = Path(mkdtemp())
    for case, config in CASES.items():
        options: Any = {"target_ckpt_format": "torch_dist", "saver_transformer_impl": "local"}
        save(path / case / "ours", config, random_weights(config).items(), **options)
    return path


@cache
def on_ranks(tensor: int) -> list[Any]:
    return run_ranks(tensor, exchange, room())


def check(ours: list[Tensor], tensor: int, case: str) -> None:
    shares = [[torch.tensor(one) for one in answers[case][0]] for answers in on_ranks(tensor)]
    theirs = [torch.cat([logits for logits, *_ in shares], -1), *shares[0][1:]]
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() <= 1e-5 * our.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [2])
def test_megatron_loads_ours_and_computes_the_same(case, tensor):
    check(our_logits(MegatronCoreLoader(room() / case / "ours")), tensor, case)


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("tensor", [2])
def test_we_load_what_megatron_saves_and_compute_the_same(case, tensor):
    on_ranks(tensor)
    loader = MegatronCoreLoader(room() / case / f"theirs-{tensor}")
    assert loader.config() == CASES[case]
    right = random_weights(CASES[case])
    assert all(torch.equal(one, right[name]) for name, one in loader.tensors())
    check(our_logits(loader), tensor, case)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [2])
def test_torch_files_hold_the_keys_and_shapes_of_megatrons_own_state(case, tensor, tmp_path):
    options: Any = {"target_tensor_parallel_size": tensor, "saver_transformer_impl": "local"}
    save(tmp_path / "core", CASES[case], random_weights(CASES[case]).items(), **options)
    for rank, (_, shapes) in enumerate(answers[case] for answers in on_ranks(tensor)):
        model = safe_unpickle.read(tmp_path / "core" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")[
            "model"
        ]
        assert {name: None if one is None else tuple(one.shape) for name, one in model.items()} == shapes
