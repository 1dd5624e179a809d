"""In which order the rows of query, key and value lie, by `checkpoint_version` (docs/specs/checkpoints.md §3.9)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

ORDERS: Mapping[float, str] = {0.0: "3 heads rows", 1.0: "heads rows 3", 2.0: "heads 3 rows", 3.0: "heads 3 rows"}
"""Version to the order of a rank's share, outermost first: `3` is query, key or value, or of two key or value."""
FUSED = {"self_attention.linear_qkv.": 3, "cross_attention.linear_kv.": 2}
"""How many are fused, of query, key and value."""


def get_version(state: Mapping[str, Any]) -> Any:
    """The version of a file's contents; files of 2019 do not name it and have 0."""
    return state.get("checkpoint_version", 0.0)


def arrangement(version: float, heads: int) -> Callable[[str, Tensor], Tensor]:
    """Puts the rows of a tensor's share, on a rank that has `heads` heads, into the order of today."""
    order = ORDERS[version].split()

    def arranged(name: str, share: Tensor) -> Tensor:
        parts = next((count for module, count in FUSED.items() if module in name), None)
        if parts is None or version >= 2:
            return share
        sizes = {"3": parts, "heads": heads, "rows": -1}
        split = share.unflatten(0, [sizes[dim] for dim in order])
        return split.movedim([order.index(dim) for dim in ORDERS[3.0].split()], (0, 1, 2)).flatten(0, 2)

    return arranged
