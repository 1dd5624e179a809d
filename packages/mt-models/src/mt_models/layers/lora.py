"""Low-rank adapters beside projections (arXiv:2106.09685); `mt_models.config.lora` says what they compute.

A projection that is fused with others has its adapter as a sibling called as the canonical projection, another one has
A and B in itself: either way their names in memory are the canonical ones.
"""

from torch import Tensor, nn

from mt_core.parallel.tensor.plan import Column, Plan, Row, Sequence
from mt_models.config.lora import Lora
from mt_models.layers.basic import Linear

Shape = int | tuple[int, ...]


class Adapter(nn.Module):
    """scale · B A x, the part that an adapter adds to a projection."""

    def __init__(self, part: Lora, into: Shape, out: Shape) -> None:
        super().__init__()
        self.lora_a = Linear(into, part.rank)
        self.lora_b = Linear(part.rank, out)
        self.scale = part.scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in…] to […, out…]."""
        return self.lora_b(self.lora_a(x)) * self.scale


class AdaptedLinear(Linear):
    """A projection with an adapter: y = W x + b + scale · B A x."""

    def __init__(self, part: Lora, into: Shape, out: Shape, *, bias: bool = False) -> None:
        super().__init__(into, out, bias=bias)
        self.lora_a = Linear(into, part.rank)
        self.lora_b = Linear(part.rank, out)
        self.scale = part.scale

    def forward(self, x: Tensor) -> Tensor:
        """[…, in…] to […, out…]."""
        return super().forward(x) + self.lora_b(self.lora_a(x)) * self.scale


def make_linear(lora: Lora | None, target: str, into: Shape, out: Shape, *, bias: bool = False) -> Linear:
    """A projection that is not fused, with an adapter if it is one of the targets."""
    if lora is None or not lora.has(target):
        return Linear(into, out, bias=bias)
    return AdaptedLinear(lora, into, out, bias=bias)


def make_adapter(lora: Lora | None, target: str, into: Shape, out: Shape) -> Adapter | None:
    """The adapter of a projection that is fused with others; None if it is none of the targets."""
    return None if lora is None or not lora.has(target) else Adapter(lora, into, out)


def add_adapter(y: Tensor, adapter: Adapter | None, x: Tensor) -> Tensor:
    """The outputs of a projection of x and what its adapter adds."""
    return y if adapter is None else y + adapter(x)


def column_plan(lora: Lora | None, target: str, rule: Column) -> Plan:
    """The rules of an adapter beside a projection whose outputs are cut: A is whole, B is cut by `rule`."""
    return {f"{target}.lora_a": Sequence(), f"{target}.lora_b": rule} if lora is not None and lora.has(target) else {}


def row_plan(lora: Lora | None, target: str) -> Plan:
    """The rules of an adapter beside a projection whose inputs are cut: A is cut with them, B is whole."""
    has = lora is not None and lora.has(target)
    return {f"{target}.lora_a": Row(dim=1), f"{target}.lora_b": Sequence()} if has else {}
