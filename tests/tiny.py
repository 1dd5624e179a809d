"""Small real models, corpora and runs that many tests share."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import torch

from mt_data.indexed.writer import IndexedWriter
from mt_models.config import GQA, Dense, Gated, GPTConfig, LayerNorm, Learned, Relative, RMSNorm, Rope, T5Config

SHARED = Path(__file__).parents[1].parent / "shared"


def llama(**changes) -> GPTConfig:
    """Two blocks with rotary positions, grouped queries and SwiGLU."""
    values = {
        "layers": 2,
        "hidden_size": 32,
        "vocab_size": 257,
        "max_seq_len": 64,
        "attention": GQA(heads=4, num_kv_heads=2, head_size=8),
        "mlp": Gated(ffn_hidden_size=48),
        "norm": RMSNorm(),
        "position": Rope(),
    }
    return GPTConfig(**(values | changes))


def gpt2(**changes) -> GPTConfig:
    """Two blocks with learned positions, biases, LayerNorm, GELU and a tied output layer."""
    values = {
        "attention": GQA(heads=4, num_kv_heads=4, head_size=8, qkv_bias=True, out_bias=True),
        "mlp": Dense(ffn_hidden_size=64, bias=True),
        "norm": LayerNorm(),
        "position": Learned(),
        "tied": True,
    }
    return llama(**(values | changes))


def t5(**changes) -> T5Config:
    """Two encoder and two decoder blocks with T5's own positions."""
    values = {
        "layers": 2,
        "hidden_size": 32,
        "vocab_size": 257,
        "max_seq_len": 64,
        "attention": GQA(heads=4, num_kv_heads=4, head_size=8),
        "mlp": Gated(ffn_hidden_size=48),
        "norm": RMSNorm(),
        "position": Relative(buckets=8, max_distance=12),
    }
    return T5Config(**(values | changes))


def built(config: GPTConfig | T5Config, *, seed: int = 7, dtype: torch.dtype = torch.float64):
    """The model, initialised."""
    model = config.build().to(dtype)
    model.initialize(seed)
    return model


def byte_corpus(prefix: Path, *, files: int = 40) -> Path:
    """Real text as bytes with an end-of-document id of 256: some sources of the standard library."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for source in sources:
            ids = np.append(np.frombuffer(source.read_bytes()[:4000], np.uint8).astype(np.uint16), 256)
            writer.add_document(ids, np.array([len(ids)]))
    return prefix


def run_toml(path: Path, corpus: Path, run_dir: Path, **sections) -> Path:
    """A run configuration for the tiny byte model, as a file; keyword sections are merged over it."""
    import tomli_w

    values = {
        "model": llama().model_dump(mode="json", exclude_none=True),
        "data": {"paths": [str(corpus)], "seq_length": 32, "split": "90,10,0", "tokenizer": {"type": "bytes"}},
        "batch": {"micro_batch": 2, "global_batch": 4},
        "train": {"steps": 6},
        "lr_schedule": {"warmup_steps": 2},
        "optim": {"lr": 1e-2},
        "log": {"every": 1},
        "runtime": {"run_dir": str(run_dir), "threads": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path.write_text(tomli_w.dumps(values))
    return path


def metrics(run_dir: Path) -> list[dict]:
    """Lines of metrics.jsonl without what depends on the clock or the machine, and so without those about saving."""
    clock = {
        "step_ms",
        "tokens_per_s",
        "trained_tokens_per_s",
        "eta_s",
        "tflops_per_rank",
        "peak_memory_gib",
        "share_of_peak",
    }
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in clock} for line in lines if "saved_step" not in line]
