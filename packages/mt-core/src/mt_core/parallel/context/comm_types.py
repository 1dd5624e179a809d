"""The exchanges of context parallelism by name: each makes, from an axis and a core, a core over sequence shares."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from mt_core.config.sections import CPCommType
from mt_core.contracts import AttentionCore
from mt_core.distributed.mesh import Axis
from mt_core.parallel.context.all_gather import gathered
from mt_core.parallel.context.ring import ring
from mt_core.parallel.context.ulysses import heads


def _ring(axis: Axis, core: AttentionCore) -> AttentionCore:
    del core  # merging by log-sum-exp needs kernels that return it
    return partial(ring, axis=axis)


def _gathered(axis: Axis, core: AttentionCore) -> AttentionCore:
    return partial(gathered, axis=axis, core=core)


def _heads(axis: Axis, core: AttentionCore) -> AttentionCore:
    return partial(heads, axis=axis, core=core)


EXCHANGES: Mapping[CPCommType, Callable[[Axis, AttentionCore], AttentionCore]] = MappingProxyType(
    {"ring": _ring, "all_gather": _gathered, "all_to_all": _heads}
)


def context_core(name: CPCommType, core: AttentionCore, *, axis: Axis) -> AttentionCore:
    """`core` for tokens shared over `axis` by the exchange `name`; on an axis of size 1, `core` itself."""
    return core if axis.size == 1 else EXCHANGES[name](axis, core)
