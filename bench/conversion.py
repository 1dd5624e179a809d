"""Conversion of a large Llama checkpoint: peak memory above the largest tensor, and rate beside a plain copy.

    python bench/conversion.py --gb 30 --sample-gb 8 --folder /somewhere/with/room

The memory is that of converting a sparse source of `--gb` (its holes read as zeros; the result is written in full).
The rate is that of converting `--sample-gb` of random bytes, in turn with a copy of the same files on the same disk.
Neither has them in the page cache, both flush what they wrote. Everything made is removed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

WIDTH, HIDDEN, VOCABULARY, GROUPS, HEADS = 4096, 14336, 128_256, 8, 32
"""Llama 3 8B's shape, with as many layers as the size asks for."""
SHARD, BLOCK = 5 * 10**9, 64 << 20
LIMIT_GB, LIMIT_RATE = 2.0, 0.7

TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "native": ("native", {}),
    "hf": ("hf", {}),
    "core torch, tensor 2 x pipeline 2": (
        "core",
        {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2},
    ),
    "core torch_dist": ("core", {"target_ckpt_format": "torch_dist"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=30.0, help="size of the sparse source for the memory; 0: skip it")
    parser.add_argument("--sample-gb", type=float, default=8.0, help="size of the source for the rate; 0: skip it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path.cwd(), help="where there is room for one source and a result"
    )
    parser.add_argument("--only", choices=TARGETS, action="append", help="some of the targets")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child))
    targets = {name: TARGETS[name] for name in args.only or TARGETS}
    with TemporaryDirectory(dir=args.folder, prefix="conversion-") as folder:
        if args.gb:
            memory(Path(folder), args.gb, targets)
        if args.sample_gb:
            rate(Path(folder), args.sample_gb, targets, args.rounds)


def child(asked: dict[str, Any]) -> None:
    """One conversion in a process of its own; prints its seconds without the process's start."""
    from mt_ckpt.conversion.convert import convert

    start = time.perf_counter()
    convert("hf", Path(asked["source"]), asked["saver"], Path(asked["target"]), options=asked["options"])
    print(time.perf_counter() - start)


def memory(folder: Path, gb: float, targets: dict[str, tuple[str, dict[str, Any]]]) -> None:
    size, largest = make_source(folder / "source", gb, sparse=True)
    say("source, sparse", f"{size / 1e9:.1f} GB, largest tensor {largest / 1e9:.2f} GB")
    for name, (saver, options) in targets.items():
        with result(folder) as target:
            seconds, _, resident, own = converted(folder / "source", saver, target, options)
        above = (resident - largest) / 1e9
        verdict = "" if above < LIMIT_GB else f"   ABOVE {LIMIT_GB} GB"
        text = f"peak {resident / 1e9:.2f} GB resident, {own / 1e9:.2f} GB of it not file pages; above the largest"
        say(f"hf to {name}", f"{text} tensor: {above:.2f} GB; {size / seconds / 1e9:.2f} GB/s{verdict}")
    shutil.rmtree(folder / "source")


def rate(folder: Path, gb: float, targets: dict[str, tuple[str, dict[str, Any]]], rounds: int) -> None:
    source = folder / "source"
    size, _ = make_source(source, gb, sparse=False)
    say("source, random bytes", f"{size / 1e9:.1f} GB")
    for name, (saver, options) in targets.items():
        ours, whole, copies = [], [], []
        for _ in range(rounds):  # in turn, so that what else the machine does falls on both
            with result(folder) as target:
                cold(source)
                copies.append(copied(source, target))
            with result(folder) as target:
                cold(source)
                start = time.perf_counter()
                ours.append(converted(source, saver, target, options)[0])
                whole.append(time.perf_counter() - start)
        best, command, copy = min(ours), min(whole), min(copies)
        verdict = "" if copy / best >= LIMIT_RATE else f"   BELOW {LIMIT_RATE:.0%}"
        text = f"{size / best / 1e9:.2f} GB/s ({size / command / 1e9:.2f} with the start of Python)"
        say(f"hf to {name}", f"{text}, copy {size / copy / 1e9:.2f}: {copy / best:.0%}{verdict}")


def converted(source: Path, saver: str, target: Path, options: dict[str, Any]) -> tuple[float, float, int, int]:
    """Seconds, user and system seconds, peak resident bytes, peak bytes that no file backs; of a process of its own."""
    asked = json.dumps({"source": str(source), "saver": saver, "target": str(target), "options": options})
    process = subprocess.Popen([sys.executable, __file__, "--child", asked], stdout=subprocess.PIPE, text=True)
    status, own = Path(f"/proc/{process.pid}/status"), 0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        own = max(own, field(status, "RssAnon"))
        time.sleep(0.02)
    assert process.stdout
    printed = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    assert code == 0, "the conversion failed"
    return float(printed), usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, own


def field(status: Path, name: str) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return 0


def copied(source: Path, target: Path) -> float:
    start = time.perf_counter()
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)  # the kernel copies: nothing passes through this process
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - start


def cold(source: Path) -> None:
    """Take the files out of the page cache."""
    for file in source.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def result(folder: Path) -> Iterator[Path]:
    """A directory for a result, removed with its bytes on the disk, so that the next result begins on a quiet one."""
    yield folder / "result"
    shutil.rmtree(folder / "result")
    os.sync()


def make_source(path: Path, gb: float, *, sparse: bool) -> tuple[int, int]:
    """A Hugging Face Llama of about this size in bf16; returns its bytes and those of the largest tensor."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    a_layer = sum(rows * columns for rows, columns in layer().values()) * 2
    layers = max(1, round((gb * 1e9 - 4 * VOCABULARY * WIDTH) / a_layer))
    for n in range(layers):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer().items()}
        shapes |= {
            f"model.layers.{n}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}
    path.mkdir()
    files: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if sum(map(nbytes, files[-1].values())) + nbytes(shape) > SHARD:
            files.append({})
        files[-1][name] = shape
    index: dict[str, str] = {}
    for number, held in enumerate(files, start=1):
        file = path / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_file(file, held, sparse=sparse)
        index |= dict.fromkeys(held, file.name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(configuration(layers)))
    return sum(map(nbytes, shapes.values())), max(map(nbytes, shapes.values()))


def layer() -> dict[str, tuple[int, int]]:
    keys = WIDTH // HEADS * GROUPS
    return {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (WIDTH, WIDTH)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (keys, WIDTH)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (HIDDEN, WIDTH)),
        "mlp.down_proj": (WIDTH, HIDDEN),
    }


def configuration(layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def nbytes(shape: tuple[int, ...]) -> int:
    return 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_file(file: Path, held: dict[str, tuple[int, ...]], *, sparse: bool) -> None:
    header, offset = {}, 0
    for name, shape in held.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset := offset + nbytes(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            out.truncate(out.tell() + offset)
        else:
            block = os.urandom(BLOCK)
            for start in range(0, offset, BLOCK):
                out.write(block[: offset - start])
        out.flush()
        os.fsync(out.fileno())


def say(name: str, value: str) -> None:
    print(f"{name:<42} {value}", flush=True)


if __name__ == "__main__":
    main()
