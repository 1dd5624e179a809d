"""AdamW in Triton that reads and writes each byte once: it also writes the weights in the model's data type.

torch's fused AdamW leaves that rounding to another pass over all main parameters. Triton is imported here, so this
module is imported only where its kernel runs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Elements that one program handles."""


@triton.jit
def _adamw_kernel(
    weight,
    rounded,
    gradient,
    mean,
    square,
    biases,
    factor,
    skipped,
    length,
    lr,
    decay,
    beta2,
    rest1,
    rest2,
    eps,
    block: tl.constexpr,
):
    if tl.load(skipped) == 0:
        at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = at < length
        g = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(factor)
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        w = tl.load(weight + at, mask=inside, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        w -= decay * w
        w -= lr / tl.load(biases) * m / (tl.sqrt(v) / tl.sqrt(tl.load(biases + 1)) + eps)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        tl.store(weight + at, w, mask=inside)
        tl.store(rounded + at, w.to(rounded.dtype.element_ty), mask=inside)


@torch.no_grad()
def step_and_round(
    optimizer: torch.optim.AdamW, rounded: Mapping[Tensor, Tensor], factor: Tensor, skipped: Tensor
) -> None:
    """Do what `optimizer.step` does with gradients times `factor`, and write each parameter to its part of `rounded`.

    `factor` is an fp32 scalar and `skipped` a boolean one, on the parameters' device: where it is true, nothing
    changes. Parameters and their gradients are contiguous, in fp32, and have had equally many steps.
    """
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            if not optimizer.state[parameter]:
                fill_state(optimizer, parameter)
        if parameters:
            _step_group(optimizer, group, parameters, rounded, factor, skipped)


def fill_state(optimizer: torch.optim.AdamW, parameter: Tensor) -> None:
    """Begin a parameter's state as torch's fused AdamW does."""
    optimizer.state[parameter] = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _step_group(
    optimizer: torch.optim.AdamW,
    group: Mapping[str, Any],
    parameters: Sequence[Tensor],
    rounded: Mapping[Tensor, Tensor],
    factor: Tensor,
    skipped: Tensor,
) -> None:
    states, lr, (beta1, beta2) = [optimizer.state[p] for p in parameters], group["lr"], group["betas"]
    torch._foreach_add_([state["step"] for state in states], (~skipped).float())  # pyright: ignore[reportPrivateImportUsage]
    count = states[0]["step"].double()
    biases = torch.stack((1 - beta1**count, 1 - beta2**count)).float()
    rates = lr, lr * group["weight_decay"], beta2, 1 - beta1, 1 - beta2, group["eps"]
    for parameter, state in zip(parameters, states, strict=True):
        tensors = parameter, rounded[parameter], parameter.grad, state["exp_avg"], state["exp_avg_sq"]
        kernel: Any = _adamw_kernel[(triton.cdiv(parameter.numel(), BLOCK),)]
        kernel(*tensors, biases, factor, skipped, parameter.numel(), *rates, BLOCK)
