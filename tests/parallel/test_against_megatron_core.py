"""The cross-check from outside: megatron-core's GPTModel with the same weights gives our loss and every gradient.

megatron-core runs here on CPU ranks over gloo, in fp32, with its local layers, plain kernels and no dropout. Two of its
demands need a word: rotary positions ask torch for the current CUDA device, so that is told to be the CPU; and dropout
of attention, even of probability 0, wants a CUDA generator unless the inference tracker stands in for it. Its sequence
parallelism needs norms from Apex or Transformer Engine, so ours is compared with its plain tensor parallelism.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from layouts import run_config
from mt_cli.run_config import run_config_type
from mt_core.distributed.mesh import Axis
from mt_core.training.batch_inputs import Batch, valid_tokens
from mt_core.training.step import backward, reduce
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import NamedTensors, Record, gather_state
from mt_core.verification.ranks import run_ranks
from mt_models.config import GQA, GPTConfig
from rank_states import CPU, state_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]

ROUNDING = 2.0**-24
"""Unit roundoff of fp32."""
BAND = 64 * ROUNDING
"""3.8e-6, of loss and gradients, relative to a tensor's largest element: sums of 32 to 128 terms, two layers deep, in
another order. The largest difference of any case below is 30 roundings, of a key's weight; of the losses it is 2."""

MODELS: dict[str, dict[str, Any]] = {
    "rope, rms, swiglu, gqa": {},
    "rope, rms, swiglu, mha, tied": {"attention": GQA(heads=8, num_kv_heads=8, head_size=4).model_dump(), "tied": True},
    "learned, layer norm, gelu, biases": {},
}


def config_of(model: str, **parallel: Any) -> Any:
    """In fp32, without dropout, whose masks differ; of 64 ids: megatron-core would give padding rows probability."""
    kind = "learned-biased" if model.startswith("learned") else "gqa"
    found = run_config(kind, precision={"dtype": "fp32"}, parallel=parallel).model_dump()
    found["model"] |= {"vocab_size": 64, "dropout": {}} | MODELS[model]
    return run_config_type().model_validate(found)


def batch_of(config: Any) -> Batch:
    """Random tokens of which about a third do not count, unevenly over the rows."""
    samples, length = config.batch.global_batch, config.data.seq_length
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(config.model.vocab_size, (samples, length + 1), generator=generator)
    mask = torch.rand(samples, length, generator=generator) < torch.linspace(0.4, 0.9, samples)[:, None]
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask.float()}


class Theirs(NamedTuple):
    """How a parameter of megatron-core is made of canonical tensors, and cut over tensor ranks."""

    parts: tuple[str, ...]
    cut: int | None = None
    """The dim, of the fused tensor in its logical shape."""


def table(config: GPTConfig) -> dict[str, Theirs]:
    """Their names → ours (docs/specs/checkpoints.md §3.2); names of what a model lacks are never asked for."""
    gated = config.mlp.kind == "gated"
    found = {
        "embedding.word_embeddings.weight": Theirs(("embed.weight",), 0),
        "embedding.position_embeddings.weight": Theirs(("position.weight",)),
        "output_layer.weight": Theirs(("head.weight",), 0),
    }
    for leaf in ("weight", "bias"):
        row = 1 if leaf == "weight" else None
        found[f"decoder.final_layernorm.{leaf}"] = Theirs((f"norm.{leaf}",))
        for n in range(config.layers):
            up = [f"layers.{n}.mlp.{name}.{leaf}" for name in (("gate", "up") if gated else ("up",))]
            found |= {
                f"decoder.layers.{n}.{name}.{leaf}": theirs
                for name, theirs in {
                    "input_layernorm": Theirs((f"layers.{n}.attn_norm.{leaf}",)),
                    "self_attention.linear_qkv": Theirs(tuple(f"layers.{n}.attn.{p}.{leaf}" for p in "qkv"), 0),
                    "self_attention.linear_proj": Theirs((f"layers.{n}.attn.out.{leaf}",), row),
                    "pre_mlp_layernorm": Theirs((f"layers.{n}.mlp_norm.{leaf}",)),
                    "mlp.linear_fc1": Theirs(tuple(up), 1 if gated else 0),
                    "mlp.linear_fc2": Theirs((f"layers.{n}.mlp.down.{leaf}",), row),
                }.items()
            }
    return found


def fuse(config: GPTConfig, parts: Sequence[Tensor]) -> Tensor:
    """Canonical tensors to one in its logical shape: [group; its queries, its key, its value], [gate; up]."""
    if len(parts) == 3:
        shape = (config.attention.num_kv_heads, -1, config.attention.head_size)
        return torch.cat([part.unflatten(0, shape) for part in parts], 1)
    return torch.stack([*parts]) if len(parts) == 2 else parts[0]


def split(config: GPTConfig, fused: Tensor, parts: int) -> Sequence[Tensor]:
    """The reverse."""
    if parts == 3:
        return [part.flatten(0, 2) for part in fused.split([config.attention.queries_per_group, 1, 1], 1)]
    return fused.unbind() if parts == 2 else [fused]


def initial(config: Any) -> NamedTensors:
    """All weights, whole, as every layout of ours draws them."""
    with torch.device("meta"):
        model = config.model.build()
    return {name: model.initial(config.runtime.seed, name).float() for name in config.model.canonical_shapes()}


def initialize_megatron(axis: Axis) -> None:
    """Its groups, over all ranks, on the CPU."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    torch.cuda.current_device = lambda: "cpu"
    initialize_rng_tracker(inference_rng_tracker=True)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=axis.size)


def megatron_model(axis: Axis, run: Any) -> Any:
    """Their model of a configuration of ours."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config: GPTConfig = run.model
    rope, gated = config.position.kind == "rope", config.mlp.kind == "gated"
    their_config = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.attention.heads,
        num_query_groups=config.attention.num_kv_heads,
        kv_channels=config.attention.head_size,
        ffn_hidden_size=config.mlp.ffn_hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm" if config.norm.kind == "rms" else "LayerNorm",
        layernorm_epsilon=config.norm.eps,
        add_bias_linear=config.mlp.bias,
        gated_linear_unit=gated,
        activation_func=F.silu if gated else partial(F.gelu, approximate="tanh"),
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=axis.size,
    )
    return GPTModel(
        their_config,
        get_gpt_layer_local_spec(normalization=their_config.normalization),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        position_embedding_type="rope" if rope else "learned_absolute",
        share_embeddings_and_output_weights=config.tied,
    )


def megatron(axis: Axis, run: Any, weights: NamedTensors) -> tuple[float, NamedTensors]:
    """Loss and the gradients of this rank's parameters, under their names."""
    model, names, batch = megatron_model(axis, run), table(run.model), batch_of(run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts, cut = names[name]
            fused = fuse(run.model, [weights[part] for part in parts])
            own = fused if cut is None else fused.chunk(axis.size, cut)[axis.rank]
            parameter.copy_(own.reshape(parameter.shape))
    length = run.data.seq_length
    positions, unseen = torch.arange(length).expand_as(batch["tokens"]), torch.ones(length, length).triu(1) > 0
    losses = model(batch["tokens"], positions, unseen[None, None], labels=batch["labels"])
    loss = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
    loss.backward()
    gradients: NamedTensors = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[name] = parameter.grad
    return float(loss.detach()), gradients


def whole(config: GPTConfig, ranks: Sequence[NamedTensors]) -> NamedTensors:
    """Gradients of all ranks under canonical names."""
    names, shapes, found = table(config), config.canonical_shapes(), {}
    for name in ranks[0]:
        parts, cut = names[name]
        shape = list(fuse(config, [torch.empty(shapes[part]) for part in parts]).shape)
        if cut is not None:
            shape[cut] //= len(ranks)
        pieces = [rank[name].view(shape) for rank in ranks]
        fused = pieces[0] if cut is None else torch.cat(pieces, cut)
        found |= dict(zip(parts, split(config, fused, len(parts)), strict=True))
    return found


def ours(axis: Axis, run: Any) -> tuple[float, NamedTensors]:
    """Loss and whole gradients, on the first rank."""
    state, batch = state_of(run, axis.size), batch_of(run)
    loss = backward(state.model, state.data_parallel, [batch], valid_tokens([batch]), CPU).loss
    reduce(state.data_parallel)
    return float(loss), gather_state(state, "gradient")


Answer = tuple[float, NamedTensors]


def both(axis: Axis) -> tuple[dict[tuple[str, bool], Answer], dict[str, Answer]]:
    """Ours of every model, with and without sequence parallelism, and theirs."""
    initialize_megatron(axis)
    mine: dict[tuple[str, bool], Answer] = {}
    theirs: dict[str, Answer] = {}
    for model in MODELS:
        for sequence in {False, axis.size > 1}:
            mine[model, sequence] = ours(axis, config_of(model, tensor=axis.size, sequence=sequence))
        run = config_of(model, tensor=axis.size)
        theirs[model] = megatron(axis, run, initial(run))
    return mine, theirs


@cache
def on_ranks(tensor: int) -> list[Any]:
    return run_ranks(tensor, both)


def record(loss: float, gradients: NamedTensors) -> Record:
    norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
    return Record([loss], [float(norm)], [gradients], gradients)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
def test_the_same_weights_give_the_same_loss_and_gradients(model, tensor, sequence):
    config = config_of(model).model
    (answers, _), *_ = on_ranks(tensor)
    mine, theirs = record(*answers[model, sequence]), [theirs[model] for _, theirs in on_ranks(tensor)]
    reference = record(theirs[0][0], whole(config, [gradients for _, gradients in theirs]))
    assert mine.weights.keys() == reference.weights.keys() == config.canonical_shapes().keys()
    assert {d.quantity: d.relative / ROUNDING for d in compare_records(mine, reference) if not d.relative <= BAND} == {}


def swapped(axis: Axis) -> float:
    """Their loss when keys and values are taken for each other."""
    initialize_megatron(axis)
    run = config_of("rope, rms, swiglu, gqa")
    weights = initial(run)
    for n in range(run.model.layers):
        k, v = f"layers.{n}.attn.k.weight", f"layers.{n}.attn.v.weight"
        weights[k], weights[v] = weights[v], weights[k]
    return megatron(axis, run, weights)[0]


def test_the_comparison_sees_a_wrong_order_of_keys_and_values():
    loss, _ = on_ranks(1)[0][0]["rope, rms, swiglu, gqa", False]
    assert abs(run_ranks(1, swapped)[0] / loss - 1) > 1000 * BAND
