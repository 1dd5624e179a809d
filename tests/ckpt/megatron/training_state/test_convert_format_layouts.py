"""Optimizers as Megatron's releases lay them out, written here from the words of
docs/specs/checkpoints.md §1.4 and §2.6.
"""

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_unsafe_globals_in_checkpoint

from ckpt.megatron.training_state.test_convert_format import contents, write_run
from mt_ckpt.megatron.dist_format.metadata import read_metadata
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.training_state.convert import Target, convert_format
from mt_core.errors import MtError

ITERATION = "iter_0000007"
KEYS = ("param", "exp_avg", "exp_avg_sq")
SPLIT = {"linear_qkv": 0, "word_embeddings": 0, "output_layer": 0, "linear_proj": 1, "linear_fc1": 0, "linear_fc2": 1}
"""What two tensor ranks cut, and along which dim; gate and up apart."""
BUCKET = 700
"""Elements; with it the vectors below have several buckets."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("layouts") / "run", "llama")


def read_dist_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Key → tensor of a torch_dist directory."""
    tensors = {}
    for key, one in read_metadata(directory).items():
        if one.size is not None:
            tensors[key] = torch.cat([chunk.read() for chunk in sorted(one.chunks, key=lambda chunk: chunk.offsets)])
    return tensors


def write_records(directory: Path, tensors: dict[str, tuple[list[int], list[Any]]], originals: Any = None) -> None:
    """Key → size and (offsets, tensor) of every chunk, in place of what the directory held."""
    known, places = {}, {}
    with (directory / "__0_0.distcp").open("wb") as file:
        for key, (size, chunks) in tensors.items():
            properties = TensorProperties(dtype=chunks[0][1].dtype)
            known[key] = TensorStorageMetadata(properties, torch.Size(size), [])
            for at, tensor in chunks:
                start = file.tell()
                torch.save(tensor.clone(), file)
                known[key].chunks.append(ChunkStorageMetadata(torch.Size(at), tensor.shape))
                index = MetadataIndex(key, torch.Size(at))
                places[index] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
    metadata: Any = Metadata(known, None, places)
    metadata.mcore_data = originals or {}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def change_common(directory: Path, name: str = "common.pt", **changes: Any) -> None:
    """Replace values of the common state, and arguments under `args`."""
    common = safe_unpickle.read(directory / name)
    vars(common["args"]).update(changes.pop("args", {}))
    torch.save(common | changes, directory / f"{name}.new")
    (directory / f"{name}.new").replace(directory / name)


def flat_pieces(key: str, whole: torch.Tensor) -> tuple[list[int], list[Any], tuple[int, ...]]:
    """0.11's way with two tensor and two data ranks: stored size, chunks, and the tensor's own shape."""
    stacked = key.startswith("decoder.layers.")
    dim = next((cut for module, cut in SPLIT.items() if module in key), None)
    fragments = [whole.shape[0] if stacked and number == 0 else 1 for number in range(whole.dim())]
    if dim is not None:
        fragments[dim + stacked] = 4 if "linear_fc1" in key else 2
    boxes = [((), whole)]
    for number, count in enumerate(fragments):
        boxes = [((*at, n), part) for at, box in boxes for n, part in enumerate(box.chunk(count, number))]
    chunks = []
    for at, box in boxes:
        flat, first = box.reshape([1] * box.dim() + [-1]), box.numel() // 3
        chunks += [((*at, first), flat[..., first:]), ((*at, 0), flat[..., :first])]
    return [*fragments, boxes[0][1].numel()], chunks, tuple(whole.shape)


def test_the_default_optimizer_of_0_11_becomes_what_main_accepts(run, tmp_path):
    convert_format(run, tmp_path / "old", Target("torch_dist", optimizer="plain"))
    directory = tmp_path / "old" / ITERATION
    tensors, originals = {}, {}
    for key, whole in read_dist_tensors(directory).items():
        if not key.startswith("optimizer."):
            tensors[key] = ([*whole.shape], [([0] * whole.dim(), whole)])
            continue
        model_key = key.split(".", 3)[3]
        size, chunks, shape = flat_pieces(model_key, whole)
        tensors["chained_0." + key] = (size, chunks)
        originals["chained_0." + key] = {"nd_reformulated_orig_global_shape": shape}
    write_records(directory, tensors, originals)
    groups = safe_unpickle.read(directory / "common.pt")["optimizer"]["optimizer"]["param_groups"]
    plain = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    kind = "fully_sharded_model_space"
    change_common(directory, optimizer={"optimizer": {"param_groups": plain}, "param_state_sharding_type": kind})

    convert_format(tmp_path / "old", tmp_path / "new", Target("torch_dist"), verify=True)
    written, common = (
        read_dist_tensors(tmp_path / "new" / ITERATION),
        safe_unpickle.read(tmp_path / "new" / ITERATION / "common.pt"),
    )
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert common["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    assert [group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]] == [7, 7]
    model = {key: tensor.shape for key, tensor in written.items() if not key.startswith("optimizer.")}
    states = {key: tensor.shape for key, tensor in written.items() if key.startswith("optimizer.")}
    assert states == {f"optimizer.state.{kind}.{key}": shape for kind in KEYS for key, shape in model.items()}
    convert_format(tmp_path / "new", tmp_path / "back", Target("native"))
    assert contents(tmp_path / "back") == contents(run)


def read_buckets(directory: Path, rank: int) -> list[dict[str, torch.Tensor]]:
    """The vectors of our one bucket, laid out again in several, without their ends' padding."""
    folder = directory / f"mp_rank_{rank:02d}"
    model = safe_unpickle.read(folder / "model_optim_rng.pt")["model"]
    numels = {name: t.numel() for name, t in model.items() if isinstance(t, torch.Tensor) and t.numel()}
    (vectors,) = safe_unpickle.read(folder / "distrib_optim.pt")[0].values()
    buckets: list[dict[str, list[torch.Tensor]]] = [{key: [] for key in KEYS}]
    start = length = 0
    for numel in reversed(numels.values()):
        start += -start % 64
        if length >= BUCKET:
            buckets.append({key: [] for key in KEYS})
            length = 0
        for key in KEYS:
            buckets[-1][key] += [torch.full((-length % 64,), 9.0), vectors[key][start : start + numel]]
        length += -length % 64 + numel
        start += numel
    assert len(buckets) > 2
    return [{key: torch.cat(parts) for key, parts in bucket.items()} for bucket in buckets]


SEVERAL = {"overlap_grad_reduce": True, "ddp_bucket_size": BUCKET, "data_parallel_size": 4}


@pytest.fixture
def several(run, tmp_path) -> Path:
    """`torch` files of two tensor ranks, whose vectors have several buckets."""
    convert_format(run, tmp_path / "several", Target("torch", tensor=2))
    for rank in range(2):
        buckets = read_buckets(tmp_path / "several" / ITERATION, rank)
        folder = tmp_path / "several" / ITERATION / f"mp_rank_{rank:02d}"
        vectors: dict[str, Any] = {key: torch.cat([bucket[key] for bucket in buckets]) for key in KEYS}
        vectors["numel_unpadded"] = len(vectors["param"])
        saved = {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): vectors}}
        torch.save(saved, folder / "distrib_optim.pt")
        change_common(folder, "model_optim_rng.pt", args=SEVERAL)
    return tmp_path / "several"


def test_vectors_of_several_buckets_are_read(several, run, tmp_path):
    convert_format(several, tmp_path / "back", Target("native"))
    assert contents(tmp_path / "back") == contents(run)


def test_vectors_that_args_lay_out_otherwise_are_refused(several, tmp_path):
    for rank in range(2):
        change_common(several / ITERATION / f"mp_rank_{rank:02d}", "model_optim_rng.pt", args={"ddp_bucket_size": 300})
    with pytest.raises(
        MtError, match=r"vectors of \d+ elements, where the parameters in \d+ buckets take \d+; args must"
    ):
        convert_format(several, tmp_path / "back", Target("native"))
    assert not (tmp_path / "back").exists()


def bucket_space(run: Path, path: Path) -> Path:
    """main's default: each bucket of each model-parallel rank is a vector of its own."""
    convert_format(run, path, Target("torch_dist", tensor=2))
    directory = path / ITERATION
    whole = {key: value for key, value in read_dist_tensors(directory).items() if not key.startswith("optimizer.")}
    tensors = {key: ([*value.shape], [([0] * value.dim(), value)]) for key, value in whole.items()}
    convert_format(run, path / "one", Target("torch", tensor=2))
    for rank in range(2):
        for number, bucket in enumerate(read_buckets(path / "one" / ITERATION, rank)):
            prefix = f"optimizer.distributed.dp_group_idx_{rank}.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32)"
            for key, vector in bucket.items():
                halves = [([0], vector[:99]), ([99], vector[99:])]
                tensors[f"{prefix}.bucket_idx_{number}.{key}"] = ([len(vector)], halves)
    write_records(directory, tensors)
    change_common(directory, args=SEVERAL)
    return path


def test_buckets_of_their_own_are_read(run, tmp_path):
    convert_format(bucket_space(run, tmp_path / "main"), tmp_path / "back", Target("native"))
    assert contents(tmp_path / "back") == contents(run)


def test_buckets_of_another_size_are_all_named(run, tmp_path):
    main = bucket_space(run, tmp_path / "main")
    change_common(main / ITERATION, args={"overlap_grad_reduce": False})
    with pytest.raises(MtError, match="bucket 0 of chunk 0, model-parallel rank 0: has .* elements; the param") as err:
        convert_format(main, tmp_path / "back", Target("native"))
    assert "rank 1: has" in str(err.value)
    assert "bucket 2 of chunk 0, model-parallel rank 1: unexpected; args describe no such bucket" in str(err.value)


def rng_states() -> list[dict[str, Any]]:
    """What a rank saves of its generators (docs/specs/checkpoints.md §1.3)."""
    return [
        {
            "random_rng_state": random.Random(3).getstate(),
            "np_rng_state": np.random.RandomState(3).get_state(),
            "torch_rng_state": torch.Generator().get_state(),
            "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
            "rng_tracker_states": {"model-parallel-rng": torch.ones(16, dtype=torch.uint8)},
        }
    ]


def test_random_states_stay_where_the_layout_does(run, tmp_path):
    convert_format(run, tmp_path / "torch", Target("torch"))
    change_common(tmp_path / "torch" / ITERATION / "mp_rank_00", "model_optim_rng.pt", rng_state=rng_states())
    moved = convert_format(tmp_path / "torch", tmp_path / "dist", Target("torch_dist"))
    assert not any("random" in line for line in moved.lost)
    again = convert_format(tmp_path / "dist", tmp_path / "again", Target("torch"))
    assert not any("--no-load-rng" in line for line in again.hints)
    file = tmp_path / "again" / ITERATION / "mp_rank_00" / "model_optim_rng.pt"
    (back,), (first,) = safe_unpickle.read(file)["rng_state"], rng_states()
    assert back["random_rng_state"] == first["random_rng_state"]
    assert np.array_equal(back["np_rng_state"][1], first["np_rng_state"][1])
    assert torch.equal(back["torch_rng_state"], first["torch_rng_state"])
    assert set(get_unsafe_globals_in_checkpoint(file)) <= safe_unpickle.allowed_names().keys()

    cut = convert_format(tmp_path / "dist", tmp_path / "cut", Target("torch_dist", tensor=2))
    assert any("random generators, which is that of 1 tensor ranks and 1 stages" in line for line in cut.lost)
    assert "start Megatron with --no-load-rng" in cut.hints
    native = convert_format(tmp_path / "dist", tmp_path / "native", Target("native"))
    assert any("random generators: mt draws from the seed" in line for line in native.lost)
