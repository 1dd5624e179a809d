"""Every rank but the first, as a process: `python -m mt_eval.generation.ranks.worker WORK`."""

import os
import signal
import sys
import threading
import time
from functools import partial

from torch._C._distributed_c10d import TCPStore

from mt_core.distributed.environment import RankInfo, get_rank_info
from mt_core.distributed.exit_codes import EXIT_LOST_RANK
from mt_core.distributed.process_group import connection_errors
from mt_core.distributed.rank_process import end_with
from mt_eval.generation.ranks.processes import Work, open_work
from mt_eval.generation.ranks.shared_model import follow


def run(work: Work, info: RankInfo) -> int:
    """Join the first rank and do what it says, until it says that all ends."""
    store = TCPStore("127.0.0.1", work.port, work.ranks.nproc, is_master=False)
    with connection_errors():
        part, calls = work.join(info.rank, open_work(work), store)
        follow(part, calls)
    return 0


def end_with_parent() -> None:
    """End this process when the first rank's is gone; a collective between GPUs would not notice."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(EXIT_LOST_RANK)

    threading.Thread(target=look, name="parent", daemon=True).start()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first rank's to handle
    end_with_parent()
    rank_info = get_rank_info()
    end_with(partial(run, Work.parse(sys.argv[1]), rank_info), rank_info)
