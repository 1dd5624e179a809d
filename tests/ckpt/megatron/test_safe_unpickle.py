"""Pickles that would run code when read are refused by the name of what they would run, and run nothing."""

import argparse
import builtins
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from mt_ckpt.megatron.dist_format.metadata import read_metadata
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.errors import MtError


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture
def victim(tmp_path):
    """A file that every attack tries to make."""
    return tmp_path / "victim"


def attacks(victim):
    touch = f"touch {victim}"
    return {
        "system": ("posix.system", Calls(os.system, touch)),
        "eval": ("builtins.eval", Calls(builtins.eval, f"open({str(victim)!r}, 'w')")),
        "nested": ("os.makedirs", {"args": argparse.Namespace(deep=[{"x": Calls(os.makedirs, str(victim))}])}),
        "getattr": ("builtins.getattr", Calls(getattr, Calls(types.SimpleNamespace), "x")),
        "storage": (
            "torch.storage._load_from_bytes",
            Calls(torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, touch))),
        ),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("name", ["system", "eval", "nested", "getattr", "storage"])
def test_an_attack_is_refused_by_name_and_not_run(name, zipped, victim, tmp_path):
    refused, value = attacks(victim)[name]
    torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(MtError, match=f"its pickle .*{refused if zipped else refused.split('.')[-1]}.*nothing was run"):
        safe_unpickle.read(tmp_path / "file.pt")
    assert not victim.exists()


def test_every_forbidden_name_is_told(victim, tmp_path):
    torch.save([attacks(victim)["system"][1], attacks(victim)["eval"][1]], tmp_path / "file.pt")
    with pytest.raises(MtError) as raised:
        safe_unpickle.read(tmp_path / "file.pt")
    assert {problem.actual for problem in raised.value.problems} == {
        "its pickle wants to use builtins.eval",
        "its pickle wants to use posix.system",
    }


def test_an_attack_in_a_directory_of_chunks_is_refused(victim, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Calls(os.system, f"touch {victim}")))
    with pytest.raises(MtError, match=r"its pickle wants to use posix\.system; nothing was run"):
        read_metadata(tmp_path)
    assert not victim.exists()


def test_what_megatron_saves_is_read(tmp_path):
    """Arguments, paths, random states; classes of Megatron's own need no Megatron."""
    value = {
        "args": argparse.Namespace(save=Path("a/b"), dtype=torch.bfloat16, sizes=torch.Size([2])),
        "of_hf": types.SimpleNamespace(x=1),
        "rng_state": [{"np_rng_state": np.random.RandomState(1).get_state()}],
        "model": {"w": torch.arange(6.0).view(2, 3), "_extra_state": None},
    }
    torch.save(value, tmp_path / "file.pt")
    content = safe_unpickle.read(tmp_path / "file.pt")
    assert str(content["args"].save) == "a/b"
    assert (content["args"].dtype, content["of_hf"].x) == (torch.bfloat16, 1)
    assert torch.equal(content["model"]["w"], value["model"]["w"])
    assert (content["rng_state"][0]["np_rng_state"][1] == value["rng_state"][0]["np_rng_state"][1]).all()


def test_classes_of_megatron_become_inert(tmp_path):
    """Read in a process that has not imported Megatron, which would register its classes with torch."""
    enums = pytest.importorskip("megatron.core.enums")
    torch.save(argparse.Namespace(model_type=enums.ModelType.encoder_or_decoder), tmp_path / "file.pt")
    code = (
        "import sys, pathlib; from mt_ckpt.megatron.torch_format import safe_unpickle;"
        "found = safe_unpickle.read(pathlib.Path(sys.argv[1])).model_type;"
        "print(isinstance(found, safe_unpickle.StandIn), type(found).__name__, found.values, 'megatron' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "file.pt"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True ModelType (1,) False"


def test_tensors_are_memory_mapped(tmp_path):
    torch.save({"w": torch.ones(1000, 1000)}, tmp_path / "file.pt")
    tensor = safe_unpickle.read(tmp_path / "file.pt")["w"]
    assert str(tmp_path / "file.pt") in Path("/proc/self/maps").read_text()
    assert float(tensor.sum()) == 1e6


@pytest.mark.parametrize("kept", [0, 10, 500])
def test_a_truncated_file_is_told(kept, tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "file.pt")
    (tmp_path / "file.pt").write_bytes((tmp_path / "file.pt").read_bytes()[:kept])
    with pytest.raises(MtError, match="truncated or not a file of torch.save|its pickle is refused"):
        safe_unpickle.read(tmp_path / "file.pt")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(MtError, match="missing; copy it"):
        safe_unpickle.read(tmp_path / "file.pt")
