"""The rank files of an old checkpoint: opened through the whitelist of pickles, and put under Core's names.

The rows of query, key and value are in an order that depends on `checkpoint_version` (docs/specs/checkpoints.md §3.9).
"""

import re
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mt_ckpt.megatron.args.bert import BERT_ONLY
from mt_ckpt.megatron.layout import RANK_FILE, rank_directory, rank_file
from mt_ckpt.megatron.legacy.names import core_state, flat
from mt_ckpt.megatron.parameters.pipeline import declared_stages
from mt_ckpt.megatron.torch_format.reader import CHUNK, State, read_state
from mt_core.errors import MtError, Problem, raise_if

DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d{3}))?")
UNTIED, DECODER = "language_model.output_layer.weight", "language_model.decoder."
ORDERS: Mapping[float, str] = {0.0: "3 heads rows", 1.0: "heads rows 3", 2.0: "heads 3 rows", 3.0: "heads 3 rows"}
"""Version to the order of a rank's share, outermost first: `3` is query, key or value, or of two key or value."""
FUSED = {"self_attention.linear_qkv.": 3, "cross_attention.linear_kv.": 2}
"""How many are fused, of query, key and value."""


@dataclass(frozen=True)
class LegacyFiles:
    """What all rank files hold."""

    tensor: int
    pipeline: int
    version: float
    args: Any
    """Arguments of the first file; None if it has none."""
    kind: str
    """gpt, bert or t5."""
    untied: bool
    """Whether there is an output layer's weight besides the embedding."""
    states: Mapping[Path, State]
    """File to chunk (`model`, or `model0`, …) to tensors by Core's names, memory-mapped."""

    @property
    def chunks(self) -> list[list[Mapping[str, Tensor]]]:
        """The chunks of every stage in the order of their layers, each as all tensor ranks hold it."""
        files = list(self.states.values())  # of all tensor ranks of stage 0, then of stage 1, …
        stages = [files[start : start + self.tensor] for start in range(0, len(files), self.tensor)]
        return [[state[name] for state in stage] for name in chunk_names(files[0]) for stage in stages]


def open_ranks(directory: Path) -> LegacyFiles:
    """Open all files; one `MtError` names every rank that is missing or too many and every misfit among the files."""
    present = sorted(directory.glob("mp_rank_*/model_*rng.pt"))
    if not present:
        raise MtError(str(directory), f"holds no mp_rank_*/{RANK_FILE}", "copy the checkpoint again")
    args = read_state(present[0]).get("args")
    tensor, pipeline = declared_sizes(args or Namespace(), present)
    ranks = [(rank, stage) for stage in range(pipeline) for rank in range(tensor)]
    files = [rank_file(directory, *rank, pipeline) for rank in ranks]
    raw = {file: read_state(file) for file in files if file.is_file()}
    raise_if([*_rank_errors(present, files, ranks, pipeline), *_file_errors(raw)])
    first = raw[files[0]]
    names = [name for state in raw.values() for chunk in chunk_names(state) for name, _ in flat(state[chunk])]
    is_bert = any(name in names for name in BERT_ONLY)
    kind = "t5" if any(name.startswith(DECODER) for name in names) else "bert" if is_bert else "gpt"
    states = {
        file: {chunk: core_state(state[chunk], kind) for chunk in chunk_names(state)} for file, state in raw.items()
    }
    return LegacyFiles(tensor, pipeline, get_version(first), args, kind, UNTIED in names, states)


def declared_sizes(args: Any, files: list[Path]) -> tuple[int, int]:
    """Tensor ranks and pipeline stages: as args say, under the newer or the older name, else as directories do."""
    numbers = [match.groups() for file in files if (match := DIRECTORY.fullmatch(file.parent.name))]
    counted = {
        "model_parallel_size": 1 + max((int(tensor) for tensor, _ in numbers), default=0),
        "pipeline_model_parallel_size": 1 + max((int(stage or 0) for _, stage in numbers), default=0),
    }
    sizes = {**counted, **{name: value for name, value in vars(args).items() if value is not None}}
    tensor = sizes.get("tensor_model_parallel_size", sizes["model_parallel_size"])
    return tensor, declared_stages(Namespace(**sizes))[0]


def chunk_names(state: State) -> list[str]:
    """`model`, or `model0`, `model1`, … of virtual stages."""
    return sorted((name for name in state if CHUNK.fullmatch(name)), key=lambda name: int(name[5:] or 0))


def _rank_errors(
    present: list[Path], files: list[Path], ranks: list[tuple[int, int]], pipeline: int
) -> Iterator[Problem]:
    tensor = max(rank for rank, _ in ranks) + 1
    is_for = f"the checkpoint is of {tensor} tensor ranks and {pipeline} stages"
    of_ranks = {rank_directory(*rank, pipeline) for rank in ranks}
    yield from (Problem(str(file), "missing", f"{is_for}: copy it") for file in files if not file.is_file())
    for file in sorted({*present} - {*files}):
        if file.name == RANK_FILE or file.parent.name[:-4] not in of_ranks:  # else what another data rank wrote
            yield Problem(str(file), "one too many", f"{is_for}: take it away, or correct args")


def _file_errors(raw: Mapping[Path, State]) -> Iterator[Problem]:
    """What is wrong with one file, or between it and the first."""
    first = next(iter(raw.values()), {})
    for file, state in raw.items():
        names = chunk_names(state)
        if not names:
            yield Problem(str(file), "holds no model", "copy it again")
        elif names != chunk_names(first):
            yield Problem(
                str(file), f"holds {', '.join(names)}, others {', '.join(chunk_names(first))}", "copy it again"
            )
        elif any(not isinstance(state[name], Mapping) or "language_model" not in state[name] for name in names):
            yield Problem(str(file), "holds no language_model, as the old classes do", "use --loader core")
        known = [get_version(first)] if get_version(first) in ORDERS else [*ORDERS]
        if get_version(state) not in known:
            allowed = f"as in other files, {known[0]}" if len(known) == 1 else f"known: {', '.join(map(str, known))}"
            yield Problem(str(file), f"checkpoint_version is {get_version(state)}", allowed)


def get_version(state: Mapping[str, Any]) -> Any:
    """The version of a file's contents; files of 2019 do not name it and have 0."""
    return state.get("checkpoint_version", 0.0)


def arrange_rows(version: float, heads: int, name: str, shard: Tensor) -> Tensor:
    """A tensor's shard with its rows in the order of today, from a rank that has `heads` heads."""
    parts = next((count for module, count in FUSED.items() if module in name), None)
    if parts is None or version >= 2:
        return shard
    order = ORDERS[version].split()
    sizes = {"3": parts, "heads": heads, "rows": -1}
    rows = shard.unflatten(0, [sizes[dim] for dim in order])
    return rows.movedim([order.index(dim) for dim in ORDERS[3.0].split()], (0, 1, 2)).flatten(0, 2)
