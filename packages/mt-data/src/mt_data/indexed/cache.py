"""Index arrays that are built once and then memory-mapped by every process.

Files are named by a hash of everything they depend on, appear whole, and are never rewritten. One process builds;
the others poll for the file, outside any collective, and say so.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mt_core.errors import MtError
from mt_core.files import atomic_file

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class IndexCache:
    """A directory of index arrays, and whether this process builds those that are missing."""

    directory: Path
    builder: bool = True
    timeout_s: float = 3600.0
    """How long a process that does not build waits."""
    message_interval_s: float = 10.0
    """How often it says so."""

    def get_arrays(
        self, key: str, names: tuple[str, ...], build: Callable[[], Mapping[str, np.ndarray]]
    ) -> list[np.ndarray]:
        """The named arrays under `key`, memory-mapped; built first where they are missing."""
        paths = [self.directory / f"{key}-{name}.npy" for name in names]
        if not all(path.exists() for path in paths):
            if self.builder:
                self._write(build(), dict(zip(names, paths, strict=True)))
            else:
                self._wait(paths)
        return [_map_array(path) for path in paths]

    def _write(self, arrays: Mapping[str, np.ndarray], paths: Mapping[str, Path]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            with atomic_file(path) as file:
                np.save(file, arrays[name], allow_pickle=False)

    def _wait(self, paths: list[Path]) -> None:
        start = time.monotonic()
        due = start + self.message_interval_s
        while missing := [path for path in paths if not path.exists()]:
            now = time.monotonic()
            if now - start > self.timeout_s:
                raise MtError(
                    str(missing[0]),
                    f"the process that builds it did not finish within {self.timeout_s:g} s",
                    "see its output; every process must see the same data.cache_dir",
                )
            if now >= due:
                due += self.message_interval_s
                print(f"waiting for {missing[0]} ({now - start:.0f} s)", file=sys.stderr, flush=True)
            time.sleep(POLL_S)


def hash_content(*parts: object) -> str:
    """A hash of values and arrays, the same in every process."""
    digest = hashlib.sha256(usedforsecurity=False)  # twice as fast as any other where the CPU has instructions for it
    for part in parts:
        data = np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as err:
        raise MtError(str(path), f"is damaged ({err})", "remove it, it is built again") from err
