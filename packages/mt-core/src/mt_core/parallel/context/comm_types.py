"""The communication types of context parallelism: each makes, from an axis and a core, a core over sequence shards."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from mt_core.config.sections import CPCommType
from mt_core.contracts import AttentionCore
from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.all_gather import all_gather_attention
from mt_core.parallel.context.ring import ring_attention
from mt_core.parallel.context.ulysses import ulysses_attention


def _ring(axis: Axis, core: AttentionCore) -> AttentionCore:
    del core  # merging by log-sum-exp needs kernels that return it
    return partial(ring_attention, axis=axis)


def _all_gather(axis: Axis, core: AttentionCore) -> AttentionCore:
    return partial(all_gather_attention, axis=axis, core=core)


def _all_to_all(axis: Axis, core: AttentionCore) -> AttentionCore:
    return partial(ulysses_attention, axis=axis, core=core)


COMM_TYPES: Mapping[CPCommType, Callable[[Axis, AttentionCore], AttentionCore]] = MappingProxyType(
    {"ring": _ring, "all_gather": _all_gather, "all_to_all": _all_to_all}
)


def make_context_core(name: CPCommType, core: AttentionCore, *, axis: Axis) -> AttentionCore:
    """Return `core` for tokens sharded over `axis`; `name` is the communication. An axis of size 1 needs none."""
    return core if axis.size == 1 else COMM_TYPES[name](axis, core)
