"""The weights that the optimizer updates, in fp32 or wider, beside those the model computes with.

With a bf16 model each parameter has an fp32 master, and the gradients of all micro-batches are added up in fp32:
18 bytes a parameter with Adam (2 weight, 4 gradient, 4 master, 8 moments). Otherwise the two are the same tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Weights:
    """Masters by parameter name. Call `publish` after the optimizer has changed them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """`model` holds full-precision values; it is cast to `dtype` here."""
        self.model = model
        if dtype != torch.bfloat16:
            self.masters = dict(model.to(dtype).named_parameters())
            return
        self.masters = {name: nn.Parameter(p.detach().clone().float()) for name, p in model.named_parameters()}
        model.to(dtype)
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(self._accumulate_into(self.masters[name]))

    @staticmethod
    def _accumulate_into(master: nn.Parameter) -> Callable[[Tensor], None]:
        def accumulate(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

        return accumulate

    def gradients(self) -> list[Tensor]:
        """Gradients of all masters, in the order of their names' registration."""
        missing = [name for name, p in self.masters.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"
        return [p.grad for p in self.masters.values() if p.grad is not None]

    def zero(self) -> None:
        """Forget all gradients."""
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model."""
        for name, parameter in self.model.named_parameters():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])
