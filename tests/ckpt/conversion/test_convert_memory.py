"""The memory of a conversion follows its largest tensor, not its checkpoint (at 30 GB: bench/conversion.py)."""

import importlib.util
import os
from pathlib import Path

import pytest

from mt_ckpt.conversion.convert import convert

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[3] / "bench" / "conversion.py"
SLACK = 160 << 20
"""What the allocator keeps."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Directories of 430 and 140 MB, all of it holes, and the bytes of their largest tensor, 38 MB."""
    spec = importlib.util.spec_from_file_location("conversion", BENCH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bench.WIDTH, bench.HIDDEN, bench.VOCABULARY, bench.SHARD = 1024, 4096, 18_432, 200 << 20
    paths = [tmp_path_factory.mktemp("sparse") / "source" for _ in range(2)]
    sizes = [bench.make_source(path, gb, sparse=True) for path, gb in zip(paths, (0.44, 0.14), strict=True)]
    (size, largest), _ = sizes
    assert size > 10 * largest
    return *paths, largest


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def growth(source: Path, small: Path, saver: str, target: Path, **options) -> int:
    """How far a process' resident memory rises in a conversion, the pages of files included."""
    reader, writer = os.pipe()
    if not os.fork():
        try:
            convert("hf", small, saver, target / "small", **options)  # imports what it needs
            before = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what it is
            convert("hf", source, saver, target / "result", **options)
            os.write(writer, str(status("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        grown = answer.read()
    os.wait()
    return int(grown)


CASES = {
    "native": ("native", {}),
    "native, rounded": ("native", {"dtype": "fp16"}),
    "core torch": ("core", {"options": {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}}),
    "core torch_dist": ("core", {"options": {"target_ckpt_format": "torch_dist"}}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_follows_the_largest_tensor(case, source, tmp_path):
    path, small, largest = source
    saver, options = CASES[case]
    grown = growth(path, small, saver, tmp_path / "result", **options)
    assert grown < largest + SLACK
