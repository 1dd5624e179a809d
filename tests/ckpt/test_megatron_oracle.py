"""megatron-core itself loads what we write: the same logits, fp32, on one and two ranks.

It runs on CPU ranks over gloo, as tests/parallel/test_against_megatron_core.py explains.
"""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt.test_megatron_round_trip import config_of
from mt_ckpt.megatron import pickles
from mt_ckpt.megatron.loader import Core
from mt_ckpt.megatron.saver import save
from mt_ckpt.verify import our_logits
from mt_core.parallel.axis import Axis
from mt_core.verification.ranks import run_ranks

pytest.importorskip("megatron.core")

ROPE = {"vocab_size": 64, "position": {"kind": "rope"}}
CASES = {"llama": ROPE, "llama tied": ROPE, "gpt2": {"vocab_size": 64}}
TOKENS_BT = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))


def weights(config: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) / 4 for name, shape in config.canonical_shapes().items()}


def theirs(axis: Axis, config: Any) -> Any:
    from parallel.test_against_megatron_core import megatron_model

    return megatron_model(axis, SimpleNamespace(model=config))


@torch.no_grad()
def exchange(axis: Axis, room: Path) -> dict[str, Any]:
    """Load ours and compute; the logits of this rank, and names and shapes of its state."""
    from megatron.core import dist_checkpointing

    from parallel.test_against_megatron_core import initialize_megatron

    initialize_megatron(axis)
    answers: dict[str, Any] = {}
    for case, changes in CASES.items():
        config = config_of(case, **changes)
        model = theirs(axis, config)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(room / case / "ours" / "release"))
        model.load_state_dict({name: value for name, value in loaded.items() if name in model.state_dict()})
        positions, unseen = torch.arange(12).expand_as(TOKENS_BT), torch.ones(12, 12).triu(1) > 0
        logits_BTV = model(TOKENS_BT, positions, unseen[None, None])
        state = model.state_dict()
        shapes = {name: getattr(value, "shape", None) for name, value in state.items()}
        answers[case] = logits_BTV.tolist(), {name: shape and tuple(shape) for name, shape in shapes.items()}
    return answers


@cache
def room() -> Path:
    """Our checkpoints of every case."""
    path = Path(mkdtemp())
    for case, changes in CASES.items():
        config = config_of(case, **changes)
        save(path / case / "ours", config, weights(config).items(), target_ckpt_format="torch_dist")
    return path


@cache
def on_ranks(tensor: int) -> list[Any]:
    return run_ranks(tensor, exchange, room())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_loads_ours_and_computes_the_same(case, tensor):
    ranks = [answers[case] for answers in on_ranks(tensor)]
    their_BTV = torch.cat([torch.tensor(logits) for logits, _ in ranks], -1)
    ours = our_logits(Core(room() / case / "ours"), TOKENS_BT)
    assert (ours - their_BTV).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tensor", [1, 2])
def test_torch_files_hold_the_keys_and_shapes_of_megatrons_own_state(case, tensor, tmp_path):
    config = config_of(case, **CASES[case])
    options: Any = {"target_tensor_parallel_size": tensor, "saver_transformer_impl": "local"}
    save(tmp_path / "core", config, weights(config).items(), **options)
    for rank, (_, shapes) in enumerate(answers[case] for answers in on_ranks(tensor)):
        model = pickles.read(tmp_path / "core" / "release" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")["model"]
        assert {name: None if value is None else tuple(value.shape) for name, value in model.items()} == shapes
