"""A whole plan: what one GPU holds, sends and takes, and what would make it fit if it does not."""

from dataclasses import dataclass

from mt_core.config.run_config import PlannedRun
from mt_core.errors import raise_if
from mt_core.parallel.layout import Layout, build_layout, problems
from mt_core.parallel.nearest_layouts import suggest_nearest
from mt_core.planning import memory
from mt_core.planning.communication import Transfer, micro_batches, transfers
from mt_core.planning.gpu_profile import Profile
from mt_core.planning.memory import Item
from mt_core.planning.step_time import StepTime, step_time

ASSUMPTIONS = (
    "Adam with fp32 moments; other optimizers hold other state.",
    "Activations as the layers save them without torch.compile; a fused attention core keeps no scores.",
    "Experts are chosen equally often: no rank gets more rows than another.",
    "Logits exist whole, with their gradient; the vocabulary of a rank is padded to vocab_divisor × tensor.",
    "Reserved memory is an estimate, and the allocator's fragmentation is not counted: leave a few percent free.",
    "FSDP holds two layers whole, and what lies outside the layers; it gathers and reduces in every micro-batch.",
    "Collectives send what a ring algorithm sends; hidden ones take no processors from arithmetic.",
    "Kernels run at the profile's rates whatever their size; small models and narrow shards are slower.",
    "Loading data, logging, checkpoints and evaluation take no time.",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a layout means on one kind of GPU."""

    layout: Layout
    items: list[Item]
    transfers: list[Transfer]
    step: StepTime
    micro_batches: int
    capacity: float
    """Bytes of one GPU."""

    @property
    def total(self) -> float:
        """Bytes that one GPU needs."""
        return memory.total(self.items)

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.total <= self.capacity


def plan(config: PlannedRun, ranks: int, profile: Profile) -> Plan:
    """The plan of a configuration on a number of GPUs; an impossible layout is an `MtError` with the nearest others."""
    failures = list(problems(config, ranks))
    if any(not problem.where.startswith("pipeline.") for problem in failures):
        failures.append(suggest_nearest(config, ranks))
    raise_if(failures)
    return plan_layout(config, build_layout(config, ranks), profile)


def plan_layout(config: PlannedRun, layout: Layout, profile: Profile) -> Plan:
    """The plan of a layout that is possible."""
    return Plan(
        layout,
        memory.memory(config, layout, profile),
        transfers(config, layout),
        step_time(config, layout, profile),
        micro_batches(config, layout),
        profile.memory_gib * memory.GIB,
    )
