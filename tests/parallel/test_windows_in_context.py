"""Windows, soft caps and a scale of scores under the exchanges of context parallelism that call the attention core."""

from typing import Any

import pytest

from layouts import run_config
from mt_cli.verify.record import records
from mt_core.verification.compare import compare_records
from mt_models.config import GQA

SCORES = GQA(heads=8, num_kv_heads=4, head_size=4, window=5, window_layers=(True, False), softcap=0.7, scale=0.3)


def config(**parallel: Any) -> Any:
    whole = run_config("gqa", parallel=parallel)
    return whole.model_copy(update={"model": whole.model.model_copy(update={"attention": SCORES})})


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_two_context_ranks_compute_what_one_rank_computes(documents):
    exchanges = [config(context=2, cp_comm_type=name) for name in ("all_gather", "all_to_all")]
    (one,) = records([config()], 1, documents=documents)
    (plain,) = records([run_config("gqa")], 1, documents=documents)
    assert any(d.relative > 1e-3 for d in compare_records(plain, one))
    for record in records(exchanges, 2, documents=documents):
        assert [d for d in compare_records(record, one) if not d.relative <= 1e-12] == []
