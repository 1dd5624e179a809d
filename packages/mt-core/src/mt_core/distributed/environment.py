"""Which rank this process is: the variables of torchrun, of srun, or of `mt train --nproc`. Only this reads them."""

import os
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from mt_core.distributed.slurm import step_variables
from mt_core.errors import MtError, Problem, raise_if

LAUNCHER = "MT_LAUNCHER"
"""Process id of the `mt train --nproc` that started this rank."""
LISTENER = "MT_STORE_LISTENER"
"""File descriptor on which rank 0 of `mt train --nproc` listens: the port is taken before anyone needs it."""
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
"""torchrun's sign that its agent holds the store, so no rank does."""


@dataclass(frozen=True, slots=True)
class RankInfo:
    """One process among the ranks of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launched: bool = False
    """Whether a launcher started it as one of several; one rank under torchrun counts too."""

    @property
    def label(self) -> str:
        """ " [rank 3]" in a launched process, else ""."""
        return f" [rank {self.rank}]" if self.launched else ""


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch reads where srun started several tasks and nobody set RANK."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        environment.update(step_variables(environment))


def get_rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo:
    """Read this process's rank; variables that are missing or contradict each other are one `MtError`."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return RankInfo()
    raise_if(_malformed(environment))
    numbers = {name: int(environment[name]) for name in _numbers(environment)}
    info = RankInfo(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers.get("LOCAL_RANK", 0),
        local_world_size=numbers.get("LOCAL_WORLD_SIZE", 1),
        launched=True,
    )
    raise_if(_contradictions(info, environment))
    return info


def is_launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def is_supervised_by_mt(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `mt train --nproc` started this rank; it will print what happened to all of them."""
    return LAUNCHER in environment


def _numbers(environment: Mapping[str, str]) -> list[str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return [name for name in names if name in environment]


def _malformed(environment: Mapping[str, str]) -> Iterator[Problem]:
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environment:
            yield Problem(name, f"not set, but {other} is", "set both, or none to train in this process alone")
    for name in _numbers(environment):
        if not environment[name].isdecimal():
            yield Problem(name, repr(environment[name]), "allowed: a whole number from 0")
    if environment.get("WORLD_SIZE") not in (None, "0", "1"):
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                yield Problem(name, f"not set, but WORLD_SIZE is {environment['WORLD_SIZE']}", "set where rank 0 is")
    if not environment.get("MASTER_PORT", "0").isdecimal():
        yield Problem("MASTER_PORT", repr(environment["MASTER_PORT"]), "allowed: a port number")


def _contradictions(info: RankInfo, environment: Mapping[str, str]) -> Iterator[Problem]:
    if info.rank >= info.world_size:
        actual = f"{info.rank}, but WORLD_SIZE is {info.world_size}"
        yield Problem("RANK", actual, f"allowed: 0 to {info.world_size - 1}")
    if "LOCAL_WORLD_SIZE" in environment and info.local_rank >= info.local_world_size:
        actual = f"{info.local_rank}, but LOCAL_WORLD_SIZE is {info.local_world_size}"
        yield Problem("LOCAL_RANK", actual, f"allowed: 0 to {info.local_world_size - 1}")
    task, tasks = environment.get("SLURM_PROCID"), environment.get("SLURM_STEP_NUM_TASKS")
    by_torchrun = "TORCHELASTIC_RUN_ID" in environment or is_supervised_by_mt(environment)
    if task and not by_torchrun and tasks == str(info.world_size) and task != str(info.rank):
        yield Problem("RANK", f"{info.rank}, but SLURM_PROCID is {task}", "unset RANK and WORLD_SIZE: srun's are used")


def refuse_nproc(nproc: int, info: RankInfo) -> None:
    """A process that is a rank already cannot start ranks."""
    if nproc > 1 and info.launched:
        actual = f"{nproc}, but this process is rank {info.rank} of {info.world_size} already"
        raise MtError("--nproc", actual, "leave it out under torchrun or srun")
