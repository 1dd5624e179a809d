"""A step of an optimizer with scaled gradients, left out if they are bad, without the host waiting for the GPU."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


def step_optimizer(optimizer: Any, rounded: Mapping[Tensor, Tensor], factor: Tensor, bad: Tensor) -> bool:
    """Step with gradients × factor, unless they are bad; return whether the parameters were rounded into `rounded`.

    torch's fused kernels take the factor and the flag on the GPU, and so does our AdamW, which rounds as well.
    """
    if takes_one_pass(optimizer, rounded):
        from mt_core.training.one_pass_adamw import step_and_round

        step_and_round(optimizer, rounded, factor, bad)
        return True
    fused = optimizer.defaults.get("fused")
    if fused and factor.dtype == torch.float32:
        optimizer.grad_scale = factor.reciprocal()
    else:
        for group in optimizer.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:  # a rank may have no main parameter
                torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
    if fused:
        optimizer.found_inf = bad.float()
    if fused or not bad:
        optimizer.step()
    return False


def takes_one_pass(optimizer: torch.optim.Optimizer, rounded: Mapping[Tensor, Tensor]) -> bool:
    """Whether this is torch's fused AdamW of fp32 parameters on a GPU, all with rounded copies, and Triton is there."""
    if type(optimizer) is not torch.optim.AdamW or not rounded or find_spec("triton") is None:
        return False
    plain = optimizer.defaults["fused"] and not optimizer.defaults["amsgrad"] and not optimizer.defaults["maximize"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return plain and all(p.is_cuda and p.dtype == torch.float32 and p in rounded for p in parameters)
