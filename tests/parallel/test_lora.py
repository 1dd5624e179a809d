"""Adapters under every kind of parallelism compute, and learn, what they do on one rank."""

from typing import Any

import pytest

from layouts import DEEP, SAMPLES, run_config
from mt_cli.verify.record import records
from mt_core.config.trainable import is_trainable
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import measure
from mt_models.config.lora import ADAPTERS, Lora

pytestmark = pytest.mark.slow

RTOL, STEPS = 1e-12, 3
TARGETS: dict[str, tuple[Any, ...]] = {
    "repeated-groups": ("q", "k", "v", "out", "gate", "up", "down"),
    "learned-biased": ("k", "v", "out", "up", "down"),
    "qk-norm": ("q", "gate", "down"),
}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("repeated-groups", {"tensor": 4, "sequence": True}),
    ("repeated-groups", {"tensor": 2, "sharding": "fsdp"}),
    ("learned-biased", {"tensor": 2, "sequence": True, "sharding": "zero1", "bucket_size": 3000}),
    ("learned-biased", {"tensor": 4}),
    ("qk-norm", {"context": 2, "sharding": "zero1"}),
    ("qk-norm", {"pipeline": 2, "tensor": 2, "sequence": True}),
)


def adapted(model: str, ranks: int, parallel: dict[str, Any]) -> Any:
    """A run's configuration; of two micro-batches on several ranks."""
    data = ranks
    for axis in ("tensor", "context", "pipeline"):
        data //= parallel.get(axis, 1)
    micro = SAMPLES if ranks == 1 else max(1, SAMPLES // data // 2)
    lora = Lora(rank=2, alpha=5.0, targets=TARGETS[model])
    batch = {"micro_batch": micro, "global_batch": SAMPLES}
    config = run_config(model, DEEP, batch=batch, parallel=parallel)
    return config.model_copy(update={"model": config.model.model_copy(update={"lora": lora})})


def test_adapters_learn_under_layouts_of_four_ranks_what_they_do_on_one():
    alone = {model: measure(adapted(model, 1, {}), 1, steps=STEPS) for model in TARGETS}
    runs = records([adapted(model, 4, parallel) for model, parallel in CASES], 4, steps=STEPS)
    for (model, parallel), record in zip(CASES, runs, strict=True):
        differences = compare_records(record, alone[model])
        wrong = [f"{d.quantity}: {d.relative:.1e}" for d in differences if not d.relative <= RTOL]
        assert wrong == [], (model, parallel)
        assert {*record.gradients[-1]} == {name for name in record.weights if is_trainable(name, [ADAPTERS])}
        assert all(gradient.any() for gradient in record.gradients[-1].values())
