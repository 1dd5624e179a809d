"""Steps of experts under every engine, where some get no tokens."""

import pytest

from layouts import run_config
from mt_cli.verify.record import records
from mt_core.verification.measure import measure
from mt_models.config import MoE
from parallel.test_parity_matrix import disagreements

pytestmark = pytest.mark.slow

ENGINES = {
    "replicate": {"sharding": "replicate"},
    "zero1": {"sharding": "zero1", "expert": 2},
    "fsdp": {"sharding": "fsdp", "expert": 2},
    "replicate, gathered": {"sharding": "replicate", "expert": 2, "token_dispatcher": "all_gather"},
}


def test_experts_without_tokens_have_a_zero_gradient_under_every_engine():
    """32 tokens choose one of 64 experts each, so most of these get none; weight decay acts on them all the same."""
    plain = run_config("experts", batch={"micro_batch": 1, "global_batch": 2})
    mlp = MoE(ffn_hidden_size=4, experts=64, top_k=1, normalized=False)
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"mlp": mlp})})
    one = measure(plain, 1, steps=2)
    names = [name for name in one.gradients[0] if ".experts." in name]
    assert len(names) == 2 * 3
    for name in names:
        assert 32 <= (one.gradients[0][name] == 0).flatten(1).all(1).sum() < 64
    sections = [plain.parallel.model_copy(update=parallel) for parallel in ENGINES.values()]
    found = records([plain.model_copy(update={"parallel": parallel}) for parallel in sections], 2, steps=2)
    for engine, run in zip(ENGINES, found, strict=True):
        assert disagreements(run, one) == [], engine
        assert all(((run.gradients[0][name] == 0) == (one.gradients[0][name] == 0)).all() for name in names)
