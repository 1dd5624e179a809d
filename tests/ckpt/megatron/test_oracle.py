"""megatron-core itself loads what we write, and we load what it saves: the same logits, fp32, on one and two ranks.

It runs on CPU ranks over gloo, as tests/parallel/test_against_megatron_core.py explains.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt.megatron.test_round_trip import build_config
from mt_ckpt.conversion.verify import our_logits
from mt_ckpt.megatron.args.gpt import write_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.distributed.mesh import Axis
from mt_core.verification.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("megatron_core")]

ROPE = {"vocab_size": 64, "position": {"kind": "rope"}}
EXPERTS = {
    "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 6, "qk_norm": True},
    "mlp": {"kind": "moe", "ffn_hidden_size": 20, "experts": 4, "top_k": 2},
}
SHARED = {"shared_ffn_hidden_size": 12, "shared_gate": True}
SIGMOID = {"score": "sigmoid", "scaling_factor": 2.5, "groups": 2, "top_groups": 1, "group_best": 2}
CASES = {
    "llama": ("llama", ROPE),
    "llama tied": ("llama tied", ROPE),
    "gpt2": ("gpt2", {"vocab_size": 64}),
    "experts": ("llama", ROPE | EXPERTS),
    "experts, all probabilities": ("llama", ROPE | EXPERTS | {"mlp": EXPERTS["mlp"] | {"normalized": False}}),
    "shared expert": ("llama", ROPE | EXPERTS | {"mlp": EXPERTS["mlp"] | SHARED | SIGMOID}),
}
SAVED = ("gpt2", "experts", "shared expert")
"""What megatron-core also saves, which takes it a second each."""
TOKENS_BT = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def weights(config: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) / 4 for name, shape in config.canonical_shapes().items()}


def config_for(case: str) -> Any:
    model, changes = CASES[case]
    return build_config(model, **changes)


def without_cuda() -> None:
    """What megatron-core lacks on this machine. Its router names a kernel of Transformer Engine that it has not
    imported; saving waits for CUDA, and for ever for a writer process, which has died for want of psutil."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = None
    torch.cuda.synchronize = lambda *_: None
    filesystem_async._process_memory = lambda: 0


def theirs(axis: Axis, config: Any) -> Any:
    """Their model; Megatron evaluates experts on tensor ranks, but trains them with sequence parallelism only."""
    from parallel.test_against_megatron_core import megatron_model

    if config.mlp.kind == "moe":
        return with_experts(axis, config).eval()
    return megatron_model(axis, SimpleNamespace(model=config))


def with_experts(axis: Axis, config: Any) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    part, mlp = config.attention, config.mlp
    their_config = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.hidden_size,
        num_attention_heads=part.heads,
        num_query_groups=part.num_kv_heads,
        kv_channels=part.head_size,
        ffn_hidden_size=mlp.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm.eps,
        qk_layernorm=part.qk_norm,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        num_moe_experts=mlp.experts,
        moe_router_topk=mlp.top_k,
        moe_router_pre_softmax=mlp.score == "softmax" and not mlp.normalized,
        moe_router_score_function=mlp.score,
        moe_router_topk_scaling_factor=mlp.scaling_factor if mlp.scaling_factor != 1 else None,
        moe_router_num_groups=mlp.groups if mlp.top_groups else None,
        moe_router_group_topk=mlp.top_groups,
        moe_shared_expert_intermediate_size=mlp.shared_ffn_hidden_size,
        moe_shared_expert_gate=mlp.shared_gate,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        transformer_impl="local",
        tensor_model_parallel_size=axis.size,
    )
    return GPTModel(
        their_config,
        get_gpt_layer_local_spec(num_experts=mlp.experts, qk_layernorm=part.qk_norm, normalization="RMSNorm"),
        vocab_size=config.vocab_size,
        max_sequence_length=config.max_seq_len,
        position_embedding_type="rope",
        rotary_base=config.position.theta,
        share_embeddings_and_output_weights=config.tied,
    )


@torch.no_grad()
def exchange(axis: Axis, room: Path) -> dict[str, Any]:
    """Load ours, compute and save; the logits of this rank, and names and shapes of its state."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron

    initialize_megatron(axis)
    without_cuda()
    answers: dict[str, Any] = {}
    for case in CASES:
        config = config_for(case)
        model = theirs(axis, config)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(room / case / "ours" / "release"))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        positions, unseen = torch.arange(12).expand_as(TOKENS_BT), torch.ones(12, 12).triu(1) > 0
        logits_BTV = model(TOKENS_BT, positions, unseen[None, None])
        state = model.state_dict()
        shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
        answers[case] = logits_BTV.tolist(), {name: shape and tuple(shape) for name, shape in shapes.items()}
        if case in SAVED:
            args = write_args(config, Layout(axis.size, 1, 1, engine=False), dtype=torch.float32, form="torch_dist")
            directory = saved_by_megatron(room, case, axis.size)
            directory.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save({**model.sharded_state_dict(), "args": args}, str(directory))
    return answers


def saved_by_megatron(room: Path, case: str, tensor: int) -> Path:
    return room / case / f"theirs-{tensor}"


@cache
def room() -> Path:
    """Our checkpoints of every case."""
    path = Path(mkdtemp())
    for case in CASES:
        config = config_for(case)
        options: Any = {"target_ckpt_format": "torch_dist", "saver_transformer_impl": "local"}
        save(path / case / "ours", config, weights(config).items(), **options)
    return path


@cache
def on_ranks(tensor: int) -> list[Any]:
    return run_ranks(tensor, exchange, room())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_loads_ours_and_computes_the_same(case, tensor):
    ranks = [answers[case] for answers in on_ranks(tensor)]
    their_BTV = torch.cat([torch.tensor(logits) for logits, _ in ranks], -1)
    ours = our_logits(MegatronCoreLoader(room() / case / "ours"), TOKENS_BT)
    assert (ours - their_BTV).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("tensor", [1, 2])
def test_we_load_what_megatron_saves_and_compute_the_same(case, tensor):
    their_BTV = torch.cat([torch.tensor(answers[case][0]) for answers in on_ranks(tensor)], -1)
    loader = MegatronCoreLoader(saved_by_megatron(room(), case, tensor))
    ours = our_logits(loader, TOKENS_BT)
    assert (ours - their_BTV).abs().max() <= 1e-5 * ours.abs().max()
    assert loader.config() == config_for(case)
    right = weights(config_for(case))
    assert all(torch.equal(tensor, right[name]) for name, tensor in loader.tensors())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_torch_files_hold_the_keys_and_shapes_of_megatrons_own_state(case, tensor, tmp_path):
    config = config_for(case)
    options: Any = {"target_tensor_parallel_size": tensor, "saver_transformer_impl": "local"}
    save(tmp_path / "core", config, weights(config).items(), **options)
    for rank, (_, shapes) in enumerate(answers[case] for answers in on_ranks(tensor)):
        model = safe_unpickle.read(tmp_path / "core" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")[
            "model"
        ]
        assert {name: None if value is None else tuple(value.shape) for name, value in model.items()} == shapes
