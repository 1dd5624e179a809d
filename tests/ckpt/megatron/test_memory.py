"""A `torch_dist` checkpoint is written and read a tensor at a time, whatever its size."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

CODE = """
import resource, sys
from pathlib import Path
import torch
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_models.config import GPTConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
config = GPTConfig.model_validate({
    "layers": 16, "hidden_size": 512, "vocab_size": 512, "max_seq_len": 8, "vocab_divisor": 8,
    "attention": {"heads": 4, "num_kv_heads": 4, "head_size": 64},
    "mlp": {"kind": "moe", "ffn_hidden_size": 128, "experts": 4, "top_k": 2},
    "norm": {"kind": "rms"}, "position": {"kind": "rope"},
})
shapes = config.canonical_shapes()
options = {"target_ckpt_format": "torch_dist"}
small = config.model_copy(update={"layers": 1})
save(Path(sys.argv[1], "warm"), small, ((n, torch.ones(s)) for n, s in small.canonical_shapes().items()), **options)
len([*MegatronCoreLoader(Path(sys.argv[1], "warm")).tensors()])
before = peak()
save(Path(sys.argv[1], "core"), config, ((name, torch.ones(shape)) for name, shape in shapes.items()), **options)
total = sum(tensor.nbytes for _, tensor in MegatronCoreLoader(Path(sys.argv[1], "core")).tensors())
print(total, peak() - before)
"""


def test_a_conversion_holds_one_tensor_at_a_time(tmp_path):
    ran = subprocess.run([sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True, check=True)
    total, grown = map(int, ran.stdout.split())
    assert total > 60e6
    assert grown < 20e6  # of tensors up to 4 MB
