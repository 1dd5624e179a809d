"""What is reported of a step whose gradient is not finite."""

import pytest
import torch

from mt_core.config.sections import ParallelConfig
from mt_core.distributed.mesh import make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.training.nonfinite import NonFiniteMonitor
from mt_core.training.step import Update


@pytest.mark.parametrize(
    ("norms", "cause"),
    [
        ([1.0, float("nan")], "first bad gradient: b (rank 0)"),
        ([1e30, 1e30], "no single parameter was non-finite (overflow in the norm)"),
    ],
)
def test_a_bad_step_is_reported_once_with_its_cause(norms, cause):
    monitor = NonFiniteMonitor(["a", "b"], make_mesh(resolve_dims(ParallelConfig(), 1)))
    monitor.record_step(1, torch.tensor(2.0), Update(torch.tensor(1.0), torch.ones(2)))
    monitor.record_step(2, torch.tensor(2.0), Update(torch.tensor(float("inf")), torch.tensor(norms)))
    assert monitor.pop_bad_steps() == [f"step 2: the loss is finite; {cause}"]
    assert monitor.pop_bad_steps() == []
