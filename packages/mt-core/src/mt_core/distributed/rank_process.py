"""How a launched rank ends: its output flushed, then at once, past the interpreter's shutdown.

Shutdown destroys what native threads may still use (gloo's, NCCL's), and a process that aborts then, after everything
was saved, would count as a failure. Everything that must be closed is closed by `with` before; `atexit` functions do
not run in a rank.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from mt_core.distributed.environment import RankInfo
from mt_core.distributed.exit_codes import EXIT_DEFECT, RankFailure
from mt_core.errors import EXIT_USER_ERROR, MtError
from mt_core.files import describe_file_error


def end_with(run: Callable[[], int], info: RankInfo) -> NoReturn:
    """Call `run` and end this process with the code that it returns, or that belongs to what it raised."""
    code = EXIT_DEFECT
    try:
        code = run()
    except MtError as err:
        code = EXIT_USER_ERROR
        for problem in err.problems:
            print(f"mt{info.label}: {problem}", file=sys.stderr)
    except RankFailure as err:
        code = err.code
        print(f"mt{info.label}: {err}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except SystemExit as err:
        code = err.code if isinstance(err.code, int) else EXIT_DEFECT
    except BaseException as err:
        text = traceback.format_exc()
        if isinstance(err, OSError) and (error := describe_file_error(err)):
            code, text = EXIT_USER_ERROR, str(error)
        print("".join(f"mt{info.label}: {line}" for line in text.splitlines(keepends=True)), file=sys.stderr)
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush(stream)
        os._exit(code)


def flush(stream: object) -> None:
    """Flush an output stream that may be closed, or whose reader may be gone."""
    try:
        stream.flush()  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError, AttributeError):
        return
