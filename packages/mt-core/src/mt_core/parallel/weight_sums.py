"""Which layers add the gradients of their weights to the step's sums themselves, and whether inside the product.

Inside the product a gradient is read and written in fp32 by the matrix kernel, which saves a pass over memory and costs
the kernel some of its speed. What is faster depends on the shape, so on a GPU each shape is timed once, at its first
product; a deterministic run and a CPU, which would convert factors to multiply into a wider type, add outside.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mt_core.config.run_config import RunConfig
from mt_core.contracts import Model, as_module
from mt_core.errors import MtError
from mt_core.parallel.data.protocol import DataParallel
from mt_core.parallel.tensor.linear import ColumnLinear, RowLinear
from mt_core.parallel.tensor.summed_linear import SummedLinear
from mt_core.parallel.tensor.weight_gradients import GradientSums, PostponedProducts, WeightSum, multiply_into

WARM_UP, ROUNDS = 2, 5


def sum_weight_gradients(
    model: Model, data_parallel: DataParallel, config: RunConfig, postponed: PostponedProducts | None
) -> None:
    """Let linear layers and experts add the gradients of their trained weights to the engine's sums, where that is
    asked for or may be faster, or where a pipeline's schedule postpones them: `postponed` then keeps them."""
    way = config.runtime.weight_gradients
    if not isinstance(data_parallel, GradientSums):
        if way == "fused":
            actual = f"fused, with parallel.sharding = {config.parallel.sharding}"
            raise MtError("runtime.weight_gradients", actual, "auto or separate: FSDP2 adds up gradients itself")
        return
    tries = way == "auto" and data_parallel.device.type == "cuda" and not config.runtime.deterministic
    if postponed is None and not tries and way != "fused":
        return
    fused = Probe().is_faster if tries else lambda *_: way == "fused"
    names = {id(weight): name for name, weight in model.named_parameters()}
    used = Counter(id(weight) for _, weight in list_weights(as_module(model)))
    for module, weight in list_weights(as_module(model)):
        if weight.requires_grad and used[id(weight)] == 1:
            total = WeightSum(names[id(weight)], weight, data_parallel, postponed or PostponedProducts(), fused)
            if hasattr(module, "weight_sum"):
                module.weight_sum = total
            else:
                module.op = SummedLinear(module.op, total)


def list_weights(model: nn.Module) -> Iterator[tuple[Any, nn.Parameter]]:
    """List the weights whose gradient is a product, with their modules: of linear layers and of experts."""
    for module in model.modules():
        op: object = getattr(module, "op", None)
        if op is F.linear or isinstance(op, ColumnLinear | RowLinear) or hasattr(module, "weight_sum"):
            yield module, module.get_parameter("weight")


class Probe:
    """Times both ways of adding a product to a sum, once for each shape."""

    def __init__(self) -> None:
        self.faster: dict[tuple[int, ...], bool] = {}

    def is_faster(self, total_OI: Tensor, g_MO: Tensor, x_MI: Tensor, add: Callable[[Tensor], None]) -> bool:
        """Whether the product is added faster inside than by `add`. The sum holds nothing of value yet."""
        shape = (*g_MO.shape, x_MI.shape[1])
        if shape not in self.faster:
            inside = time_on_gpu(lambda: multiply_into(total_OI, g_MO, x_MI, overwrite=False))
            self.faster[shape] = inside < time_on_gpu(lambda: add(g_MO.mT @ x_MI))
        return self.faster[shape]


def time_on_gpu(function: Callable[[], object]) -> float:
    """Return the milliseconds of the fastest of some calls, on the current stream."""
    for _ in range(WARM_UP):
        function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return min(begin.elapsed_time(end) for begin, end in events)
