"""Memory that a stream of tensors is done with goes back to the kernel, so that its own does not grow."""

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

DONTNEED = 4
"""MADV_DONTNEED: the pages leave this process; whoever reads them again gets them from the file."""
MAPS = Path("/proc/self/maps")


def drop_pages(*tensors: Tensor) -> None:
    """Give back the pages of one mapped file from the lowest of its tensors to the highest, whatever lies between.

    Give those of earlier calls again: some consumers read a tensor late, when they have what belongs to it. Memory that
    is not a mapped file's is left alone; numbers that were changed in place are the file's again.
    """
    places = [(tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.nbytes]
    if not places:
        return
    first = -(-min(start for start, _ in places) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = max(start + size for start, size in places) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and _in_one_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONTNEED)


def _in_one_file(first: int, last: int) -> bool:
    """Whether these addresses lie in one mapping of a file; otherwise the call would turn numbers into zeros."""
    for line in MAPS.read_text().splitlines() if MAPS.exists() else ():
        addresses, _, _, _, inode = line.split(maxsplit=5)[:5]
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start <= first and last <= end:
            return inode != "0"
    return False


def trim() -> None:
    """Give back what has been freed and glibc keeps: torch's aligned blocks leave gaps that it never fills again."""
    c_library = ctypes.CDLL(None)
    if hasattr(c_library, "malloc_trim"):  # glibc's
        c_library.malloc_trim(0)
