"""`--nproc N`: this process is the first rank; it starts the others, watches them, and ends with them.

A rank that fails says why, and ends all of them: whoever waits for it notices that its connection is closed. Where that
is not noticed, as in a collective between GPUs, or before all have joined, this process ends itself `GRACE_S` later.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from mt_core.distributed.environment import LAUNCHER, get_rank_info, refuse_nproc
from mt_core.distributed.exit_codes import RankFailure, shell_code
from mt_core.distributed.mesh import make_mesh
from mt_core.distributed.process_group import connection_errors, pick_device
from mt_core.distributed.rank_process import flush
from mt_core.distributed.topology import ParallelDims
from mt_core.errors import MtError
from mt_eval.generation.ranks.cut import make_part
from mt_eval.generation.ranks.shared_model import Calls, SharedModel
from mt_eval.load import Checkpoint, check_generates, load_model, pick_dtype
from mt_eval.options import ModelOptions, RankOptions
from mt_models.config import GPTConfig

if TYPE_CHECKING:
    from mt_eval.generation.ranks.part import ModelPart
    from mt_models.models.gpt import GPT

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""So long may ranks differ in loading their parts, or in computing."""
POLL_S, GRACE_S = 0.05, 2.0
"""How often the other ranks are looked at; how long this one has to notice that one is gone, or they that all ends."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a rank has to know; it travels as JSON."""

    path: str
    model: ModelOptions
    ranks: RankOptions
    port: int
    """Where the first rank's store listens, on this machine."""

    def dump(self) -> str:
        """Write it as a text."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> "Work":
        """Read what `dump` wrote."""
        values: dict[str, Any] = json.loads(text)
        return cls(values["path"], ModelOptions(**values["model"]), RankOptions(**values["ranks"]), values["port"])

    def join(self, rank: int, checkpoint: Checkpoint, store: Store) -> "tuple[ModelPart, Calls]":
        """Connect this rank with the others, and load its part."""
        device = pick_device(self.model.device, where="--device")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // self.ranks.nproc)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=self.ranks.nproc,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        calls, mesh = Calls(), make_mesh(ParallelDims(tensor=self.ranks.tensor, pipeline=self.ranks.pipeline))
        config, tensors = cast(GPTConfig, checkpoint.loader.config()), checkpoint.loader.tensors()
        return make_part(config, mesh, device, pick_dtype(self.model.dtype), tensors), calls


@contextmanager
def open_model(checkpoint: Checkpoint, model: ModelOptions, ranks: RankOptions) -> "Iterator[GPT | SharedModel]":
    """The checkpoint's model, whole in this process or shared with ranks that live as long as the block.

    `MtError` for a layout that the model does not have, and where a rank was lost.
    """
    check_generates(checkpoint)
    refuse_nproc(ranks.nproc, get_rank_info())
    if ranks.nproc == 1:
        yield load_model(checkpoint, device=model.device, dtype=model.dtype)
        return
    store = TCPStore("127.0.0.1", 0, ranks.nproc, is_master=True, wait_for_workers=False)
    work = Work(str(checkpoint.path), replace(model, loader_options=dict(model.loader_options)), ranks, store.port)
    others = OtherRanks(work)
    try:
        with connection_errors():
            part, calls = work.join(0, checkpoint, store)
            shared = SharedModel(part, calls)
            yield shared
            shared.end()
            others.wait()
            dist.destroy_process_group()
    except RankFailure as err:
        raise others.describe_loss() or err from err
    finally:
        others.stop()


class OtherRanks:
    """The processes of all ranks but the first, and a thread that looks at them."""

    def __init__(self, work: Work) -> None:
        self._size, self._work = work.ranks.nproc, work.dump()
        self._processes = [self._start(rank) for rank in range(1, self._size)]
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._look, name="ranks", daemon=True)
        self._watch.start()

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self._size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",  # the store's is in the work
            LAUNCHER: str(os.getpid()),
        }
        command = [sys.executable, "-m", "mt_eval.generation.ranks.worker", self._work]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    def describe_loss(self) -> MtError | None:
        """Which rank has ended, and how; None if none does soon."""
        deadline = time.monotonic() + GRACE_S / 2
        while not (lost := self._find_lost()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if lost is None:
            return None
        rank, code = lost
        how = f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
        return MtError(f"rank {rank} of {self._size}", how, "what it says above is the cause; all ranks end with it")

    def _find_lost(self) -> tuple[int, int] | None:
        codes = [(rank, process.poll()) for rank, process in enumerate(self._processes, start=1)]
        return next(((rank, shell_code(code)) for rank, code in codes if code is not None), None)

    def _look(self) -> None:
        while not self._stopping.wait(POLL_S):
            if self._find_lost() and not self._stopping.wait(GRACE_S):
                for problem in getattr(self.describe_loss(), "problems", ()):
                    print(f"mt: {problem}", file=sys.stderr)
                self._kill()
                for stream in (sys.stdout, sys.stderr):
                    flush(stream)
                _, code = self._find_lost() or (0, 1)
                os._exit(code or 1)

    def wait(self) -> None:
        """Let ranks that were told to end do so."""
        self._stopping.set()
        for process in self._processes:
            process.wait(GRACE_S)

    def stop(self) -> None:
        """End whatever has not ended."""
        self._stopping.set()
        self._kill()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def open_work(work: Work) -> Checkpoint:
    """The checkpoint that a rank reads its part of."""
    return Checkpoint.open(Path(work.path), work.model.loader, work.model.loader_options)
