"""Arithmetic in which a row's result does not depend on the other rows, nor on how many there are, to the last bit.

A matrix library chooses its routine by the number of rows, and one routine adds in another order than the other; an
activation's vector code and the scalar code for what is left behind whole vectors round differently. On the CPU both
can be avoided at little cost: matrix products run in tiles of a few fixed sizes, by packed weights if there are any,
once `agrees_in_tiles` has compared these with each other on random numbers, and else row by row; activations run in
pieces that one thread computes in whole vectors. What is not in the table rounds every element correctly, or works row
by row as norms and the softmax do.

Shape suffixes: M rows, I and O features of inputs and outputs.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mt_eval.generation.exact.packed_weights import PackedWeights, multiply_packed

TILES = (128, 64, 32, 16, 8)
"""Rows of a matrix product, the most first; fewer are padded to the next."""
PIECE = 1 << 14
"""Elements that an activation takes at a time: so many are never divided among threads."""
VECTORS = 64
"""Elements of whole vectors, however wide the processor's are."""


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A product of rows with a weight, to which a bias may be added."""


def multiply_tiles(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, product: Product | None = None) -> Tensor:
    """The product in tiles of `TILES` rows; the rows of padding are left out."""
    product = product or F.linear
    parts, first = [], 0
    while first < len(x_MI):
        left = len(x_MI) - first
        size = min((size for size in TILES if size >= left), default=TILES[0])
        tile = x_MI[first : first + size]
        if len(tile) < size:
            tile = F.pad(tile, (0, 0, 0, size - len(tile)))
        parts.append(product(tile.clone() if first else tile, weight_OI, bias_O)[:left])
        first += size
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def multiply_rows(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The product of each row alone."""
    return torch.cat([F.linear(row.clone()[None], weight_OI, bias_O) for row in x_MI])


def agrees_in_tiles(weight_OI: Tensor, bias_O: Tensor | None, product: Product | None = None) -> bool:
    """Whether a row's product with a weight is the same in tiles of all sizes and in every place of a tile."""
    product = product or F.linear
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(TILES[0], weight_OI.shape[1], generator=generator, dtype=torch.float64).to(weight_OI.dtype)
    whole_MO = product(x_MI, weight_OI, bias_O)
    for size in TILES[1:]:
        parts = [product(tile.clone(), weight_OI, bias_O) for tile in x_MI.split(size)]
        if not torch.equal(torch.cat(parts), whole_MO):
            return False
    shifted_MI = torch.cat((x_MI[1:], x_MI[:1]))
    return torch.equal(product(shifted_MI, weight_OI, bias_O)[:-1], whole_MO[1:])


def apply_in_pieces(function: Callable[..., Tensor], x: Tensor, *args: object, **options: object) -> Tensor:
    """An elementwise function of each piece of a tensor, the last one padded to whole vectors."""
    flat = x.reshape(-1)
    flat = F.pad(flat, (0, -len(flat) % VECTORS))
    pieces = [function(piece, *args, **options) for piece in flat.split(PIECE)]
    result = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return result[: x.numel()].view(x.shape)


ELEMENTWISE = frozenset(
    {
        *(F.silu, F.gelu, F.sigmoid, F.tanh, F.softplus),
        *(torch.sigmoid, torch.tanh, torch.exp, torch.cos, torch.sin, torch.rsqrt),
        *(Tensor.sigmoid, Tensor.tanh, Tensor.exp, Tensor.cos, Tensor.sin, Tensor.rsqrt),
    }
)
"""Functions whose vector and scalar code may round differently."""


class BatchInvariance(TorchFunctionMode):
    """While it is entered, torch's functions compute each row as if it were alone; for models on the CPU."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        """`parameters` are those that matrix products may be made with packed."""
        super().__init__()
        self._packed = PackedWeights(parameters)
        self._tiled: dict[tuple[object, ...], bool] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch's, in another shape if it is a matrix product or an activation."""
        kwargs = kwargs or {}
        if func is F.linear:
            return self.multiply(*args, **kwargs)
        if func in ELEMENTWISE:
            return apply_in_pieces(func, *args, **kwargs)
        return func(*args, **kwargs)

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that it is entered while that runs."""

        def run(*inputs: Any, **keywords: Any) -> Any:
            with self:
                return function(*inputs, **keywords)

        return run

    def multiply(self, x: Tensor, weight_OI: Tensor, bias: Tensor | None = None) -> Tensor:
        """What `torch.nn.functional.linear` gives, each row as if it were alone."""
        x_MI = x.reshape(-1, x.shape[-1])
        if not len(x_MI):
            return F.linear(x, weight_OI, bias)
        x_MI = x_MI.contiguous()
        packed = self._packed.find(weight_OI)
        if packed is not None and self._agrees(weight_OI, bias, packed):
            y_MO = multiply_tiles(x_MI, packed, bias, multiply_packed)
        elif self._agrees(weight_OI, bias):
            y_MO = multiply_tiles(x_MI, weight_OI, bias)
        else:
            y_MO = multiply_rows(x_MI, weight_OI, bias)
        return y_MO.view(*x.shape[:-1], -1)

    def _agrees(self, weight_OI: Tensor, bias: Tensor | None, packed: Tensor | None = None) -> bool:
        key = weight_OI.shape, weight_OI.stride(), weight_OI.dtype, bias is None, packed is None
        key = (*key, torch.get_num_threads())
        if key not in self._tiled:
            weight, product = (weight_OI, None) if packed is None else (packed, multiply_packed)
            self._tiled[key] = agrees_in_tiles(weight, bias, product)
        return self._tiled[key]
