"""Translates what srun sets for a task to the variables that torch reads. Parses node lists without scontrol."""

import re
from collections.abc import Iterator, Mapping
from itertools import product

from mt_core.errors import MtError

PORTS = range(20_000, 30_000)
"""Below the ephemeral ports, so that no outgoing connection holds one of them."""


def step_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK and the rest for a task of a step of several; empty where this is none, for example in a batch script.

    A batch script has SLURM_PROCID too, so the mark of a step is its list of nodes, which only srun sets.
    """
    if not {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= environment.keys():
        return {}
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if tasks <= 1:
        return {}
    task = _number(environment, "SLURM_PROCID")
    if task >= tasks:
        raise MtError("SLURM_PROCID", f"{task}, but the step has {tasks} tasks", f"allowed: 0 to {tasks - 1}")
    nodes = list(node_names(environment["SLURM_STEP_NODELIST"]))
    variables = {
        "RANK": str(task),
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": str(_number(environment, "SLURM_LOCALID")),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environment, tasks, len(nodes))),
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(_port(environment)),
    }
    return {name: environment.get(name) or value for name, value in variables.items()}


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not text.isdecimal():
        actual = "not set, but SLURM_PROCID is" if text is None else repr(text)
        raise MtError(name, actual, "start ranks with srun, or set RANK, WORLD_SIZE, LOCAL_RANK and MASTER_*")
    return int(text)


def _tasks_here(environment: Mapping[str, str], tasks: int, nodes: int) -> int:
    """Tasks of the step on this node."""
    share, more = divmod(tasks, nodes)
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or f"{share + 1}(x{more}),{share}(x{nodes - more})"
    counts = list(tasks_per_node(text))
    node = _number(environment, "SLURM_NODEID", "0")
    if node >= len(counts):
        raise MtError("SLURM_NODEID", f"{node}, but the step has tasks on {len(counts)} nodes", f"tasks: {text!r}")
    return counts[node]


def _port(environment: Mapping[str, str]) -> int:
    """A port that is equal for all tasks of a step and differs for the next step."""
    job, step = (_number(environment, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return PORTS[(job * 7 + step) % len(PORTS)]


def tasks_per_node(text: str) -> Iterator[int]:
    """Numbers of "4(x2),3": 4, 4, 3."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise MtError("SLURM_STEP_TASKS_PER_NODE", repr(text), 'allowed: counts, as in "4(x2),3"')
        yield from [int(match[1])] * int(match[2] or 1)


def node_names(text: str) -> Iterator[str]:
    """Names of "node[01-03,07],gpu3": node01, node02, node03, node07, gpu3. Several brackets multiply."""
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if not parts or ",".join(parts) != text:
        raise MtError("SLURM_STEP_NODELIST", repr(text), 'allowed: names, as in "node[01-04,07],gpu3"')
    for part in parts:
        pieces = [list(_range(piece, text)) for piece in re.findall(r"\[[^\]]*\]|[^\[]+", part)]
        yield from map("".join, product(*pieces))


def _range(piece: str, text: str) -> Iterator[str]:
    """Numbers of "[01-03,07]" with their zeros; anything else is itself."""
    if not piece.startswith("["):
        yield piece
        return
    for item in piece[1:-1].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if not match:
            raise MtError("SLURM_STEP_NODELIST", repr(text), f"{item!r} is no number and no range like 01-04")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
