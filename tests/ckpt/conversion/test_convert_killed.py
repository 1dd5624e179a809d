"""A conversion that is killed leaves no result, and running it again cleans up after it."""

import os
import signal
from pathlib import Path

import pytest

from mt_ckpt.conversion.convert import convert
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

TENSORS = 30
POINTS = {"before the first tensor": 0, "in the middle": 17, "while the result is verified": TENSORS + 5}


def killed(source: Path, saver: str, target: Path) -> int:
    """Convert in a process that is killed on the way; the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            convert("killed", source, saver, target, verify=True)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("saver", ["native", "hf", "core"])
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_conversion_leaves_no_result_and_is_redone(point, saver, native, tmp_path, add_component, monkeypatch):
    add_component("ckpt-loader", "killed", "ckpt.faulty_plugins:Killed")
    monkeypatch.setenv("KILLED_AT", str(POINTS[point]))
    target = tmp_path / "out" / "result"
    assert killed(native, saver, target) == signal.SIGKILL
    (leftover,) = target.parent.iterdir()
    assert leftover.name.startswith("result.")
    assert leftover.name.endswith(".tmp")
    assert convert("native", native, saver, target, verify=True).tensors == TENSORS
    assert list(target.parent.iterdir()) == [target]
    assert open_checkpoint(target).config() == open_checkpoint(native).config()


def test_a_saver_that_leaves_tensors_out_is_told(native, tmp_path, add_component):
    add_component("ckpt-saver", "three", "ckpt.faulty_plugins:takes_three")
    with pytest.raises(MtError, match="saver three: took only 3 of 30 tensors; it must write every tensor: report"):
        convert("native", native, "three", tmp_path / "result")
    assert not list(tmp_path.glob("result*"))
