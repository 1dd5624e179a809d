"""megatron-core itself loads what we write, and we load what it saves: the same logits, fp32, on one and two ranks, and
on one the same gradients of experts and latent attention.

It runs on CPU ranks over gloo, as tests/parallel/test_against_megatron_core.py explains.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from ckpt.megatron.core_models import build_their_gpt, without_cuda
from ckpt.megatron.test_round_trip import build_config
from mt_ckpt.conversion.verify import our_logits
from mt_ckpt.megatron.args.gpt import write_args
from mt_ckpt.megatron.layout import Layout
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.distributed.mesh import Axis
from mt_core.verification.ranks import run_ranks
from mt_models.canonical import load_stream

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
LATENT = {"kind": "mla", "heads": 4, "kv_lora_rank": 8, "nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5}
YARN = {"kind": "yarn", "factor": 4.0, "original_positions": 8}
DENSE_FIRST = {"dense_layers": 1, "dense_ffn_hidden_size": 24}
BIASED = SIGMOID | {"shared_ffn_hidden_size": 12, "expert_bias": True}
CASES |= {
    "dense first": ("llama", ROPE | EXPERTS | {"layers": 2, "mlp": EXPERTS["mlp"] | DENSE_FIRST}),
    "latent": (
        "llama",
        ROPE
        | {"layers": 2, "attention": LATENT | {"q_lora_rank": 10}}
        | {"position": {"kind": "rope", "theta": 500.0, "scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}}},
    ),
    "latent, other scales": (
        "llama",
        ROPE
        | {"layers": 1, "attention": LATENT}
        | {"position": {"kind": "rope", "scaling": YARN | {"mscale": 0.5, "mscale_all_dim": 0.9}}},
    ),
    "latent experts": (
        "llama",
        ROPE | {"layers": 3, "attention": LATENT, "mlp": EXPERTS["mlp"] | DENSE_FIRST | BIASED},
    ),
    "latent, all experts": (
        "llama",
        ROPE
        | {"layers": 2, "attention": LATENT | {"q_lora_rank": 10}, "mlp": EXPERTS["mlp"] | SHARED}
        | {"position": {"kind": "rope", "scaling": YARN}},
    ),
}
SAVED = ("gpt2", "experts", "shared expert", "dense first", "latent", "latent experts")
"""What megatron-core also saves, which takes it a second each."""
TRAINED = ("experts", "shared expert", "latent", "latent experts", "latent, all experts")
"""Whose gradients it computes, on one rank."""
ROUNDING = 2.0**-24
"""Unit roundoff of fp32."""
TOKENS_BT = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def weights(config: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) / 4 for name, shape in config.canonical_shapes().items()}


def config_for(case: str) -> Any:
    model, changes = CASES[case]
    return build_config(model, **changes)


def exchange(axis: Axis, room: Path) -> dict[str, Any]:
    """Load ours, compute and save; the logits of this rank, and names and shapes of its state."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron

    initialize_megatron(axis)
    without_cuda()
    answers: dict[str, Any] = {}
    for case in CASES:
        config = config_for(case)
        model = build_their_gpt(axis, config)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(room / case / "ours" / "release"))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        positions, unseen = torch.arange(12).expand_as(TOKENS_BT), torch.ones(12, 12).triu(1) > 0
        if case in TRAINED and axis.size == 1:
            save_gradients(model, config, room / case / "gradients")
        with torch.no_grad():
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


def save_gradients(model: Any, config: Any, directory: Path) -> None:
    """Save the gradients of their loss in place of weights, where our loader finds them."""
    positions, unseen = torch.arange(12).expand_as(TOKENS_BT), torch.ones(12, 12).triu(1) > 0
    model.train()
    model(TOKENS_BT, positions, unseen[None, None], labels=TOKENS_BT.roll(-1, 1)).mean().backward()
    model.eval()
    args = write_args(config, Layout(1, 1, 1, engine=False), dtype=torch.float32, form="torch")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    (directory / "mp_rank_00").mkdir(parents=True)
    state = {"args": args, "model": {**model.state_dict(), **gradients}}
    torch.save(state, directory / "mp_rank_00" / "model_optim_rng.pt")


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


@pytest.mark.parametrize("case", TRAINED)
def test_every_gradient_is_megatrons(case):
    on_ranks(1)
    loader = MegatronCoreLoader(room() / case / "ours")
    model = loader.config().build().train()
    load_stream(model, loader.tensors())
    model.token_losses(TOKENS_BT, TOKENS_BT.roll(-1, 1)).mean().backward()
    ours: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        ours |= model.to_canonical(name, parameter.grad)
    theirs = dict(MegatronCoreLoader(room() / case / "gradients").tensors())
    assert ours.keys() == {name for name in theirs if not name.endswith("router.bias")}
    off = {name: ((ours[name] - theirs[name]).abs().max() / ours[name].abs().max()).item() / ROUNDING for name in ours}
    print(case, max(off.items(), key=lambda p: p[1]))
    assert {name: value for name, value in off.items() if not value <= 64} == {}


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
