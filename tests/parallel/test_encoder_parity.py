"""BERT and T5 compute under each layout what one rank computes, in fp64, gradient by gradient."""

from functools import cache
from typing import Any

import pytest

from layouts import SAMPLES, data_ranks, run_config
from mt_cli.verify.record import records
from mt_core.verification.compare import compare_records
from mt_core.verification.measure import Record

pytestmark = pytest.mark.slow

RTOL = 1e-12
ATTENTION = {"heads": 4, "num_kv_heads": 4, "head_size": 8, "qkv_bias": True, "out_bias": True}
BIASED = {"mlp": {"kind": "dense", "ffn_hidden_size": 48, "bias": True}, "norm": {"kind": "layer"}}
DROPOUT = {"attention": 0.2, "hidden": 0.1, "embedding": 0.3}
NO_ORDER = {"pooler": False, "binary_head": False}
TASK = {"lm_head": False, "binary_head": False}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {"kind": "bert", "attention": ATTENTION, **BIASED},
    "bert, norms after, no order": {
        "kind": "bert",
        "attention": ATTENTION,
        "norm_place": "after",
        "dropout": DROPOUT,
        **BIASED,
        **NO_ORDER,
    },
    "bert, classes": {
        "kind": "bert",
        "attention": ATTENTION,
        "dropout": DROPOUT,
        "task_head": {"kind": "classification", "classes": 3},
        **BIASED,
        **TASK,
    },
    "bert, numbers": {"kind": "bert", "attention": ATTENTION, "task_head": {"kind": "regression"}, **BIASED, **TASK},
    "bert, choices": {
        "kind": "bert",
        "attention": ATTENTION,
        "dropout": DROPOUT,
        "norm_place": "after",
        "task_head": {"kind": "multiple_choice"},
        **BIASED,
        **TASK,
    },
    "t5": {
        "kind": "t5",
        "decoder_layers": 2,
        "attention": {"heads": 4, "num_kv_heads": 2, "head_size": 6, "scale": 1.0, "qk_norm": True},
        "mlp": {"kind": "gated", "ffn_hidden_size": 48, "activation": "gelu_tanh"},
        "norm": {"kind": "rms"},
        "position": {"kind": "relative", "buckets": 8, "max_distance": 12},
    },
    "t5 of Megatron": {
        "kind": "t5",
        "decoder_layers": 1,
        "attention": ATTENTION,
        "position": {"kind": "learned"},
        "dropout": DROPOUT,
        "tied": True,
        "head_bias": True,
        **BIASED,
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "zero1 2": (2, {"sharding": "zero1", "bucket_size": 3000}),
    "fsdp 2": (2, {"sharding": "fsdp"}),
    "tensor 4": (4, {"tensor": 4}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2 × tensor 2": (4, {"pipeline": 2, "tensor": 2}),
}
RECOMPUTE = {"t5": {"granularity": "full", "method": "uniform", "layers": 2}, "bert": {"granularity": "selective"}}


def config_of(model: str, ranks: int = 1, parallel: dict[str, Any] | None = None) -> Any:
    sizes = {"layers": 2, "hidden_size": 32, "vocab_size": 61, "vocab_divisor": 4, "max_seq_len": 16, "init_std": 0.2}
    parallel = parallel or {}
    micro = SAMPLES // data_ranks(ranks, parallel) // 2
    return run_config().model_validate(
        {
            **run_config(parallel=parallel, recompute=RECOMPUTE.get(model, {}) if ranks > 1 else {}).model_dump(),
            "model": sizes | MODELS[model],
            "batch": {"micro_batch": micro, "global_batch": SAMPLES},
        }
    )


def models_of(layout: str) -> list[str]:
    """Only groups that are fewer than ranks need four of these."""
    if layout == "tensor 4":
        return ["t5"]
    if LAYOUTS[layout][1].get("pipeline"):  # a rule says which models are cut into stages
        return [name for name in MODELS if name.startswith("bert")]
    return [*MODELS]


@cache
def recorded(layout: str) -> dict[str, Record]:
    """All models under a layout on the same ranks."""
    ranks, parallel = LAYOUTS.get(layout, (1, {}))
    models = models_of(layout) if layout in LAYOUTS else list(MODELS)
    return dict(zip(models, records([config_of(m, ranks, parallel) for m in models], ranks), strict=True))


@pytest.mark.parametrize(("layout", "model"), [(each, model) for each in LAYOUTS for model in models_of(each)])
def test_losses_gradients_and_weights_of_three_steps_are_those_of_one_rank(layout, model):
    found = compare_records(recorded(layout)[model], recorded("one rank")[model])
    assert [f"{d.quantity}: {d.relative:.1e}" for d in found if not d.relative <= RTOL] == []


METRICS = {
    "bert": {"masked_lm_loss", "sentence_order_loss", "sentence_order_accuracy"},
    "bert, norms after, no order": {"masked_lm_loss"},
    "bert, classes": {"accuracy"},
    "bert, numbers": set(),
    "bert, choices": {"accuracy"},
    "t5": {"span_loss"},
    "t5 of Megatron": {"span_loss"},
}


@pytest.mark.parametrize(("layout", "model"), [(each, model) for each in LAYOUTS for model in models_of(each)])
def test_what_is_reported_beside_the_loss_is_that_of_one_rank_and_adds_up_to_it(layout, model):
    found, expected = recorded(layout)[model], recorded("one rank")[model]
    for ours, theirs, loss in zip(found.metrics, expected.metrics, found.losses, strict=True):
        assert ours.keys() == METRICS[model]
        assert ours == pytest.approx(theirs, rel=RTOL)
        losses = [value for name, value in ours.items() if name.endswith("loss")]
        assert not losses or sum(losses) == pytest.approx(loss, rel=RTOL)
