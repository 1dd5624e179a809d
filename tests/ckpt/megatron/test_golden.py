"""What the saver writes for two tensor ranks and two stages, against tables written by hand from the specification.

Source: docs/specs/checkpoints.md §1.1, §1.2, §2 and §3. The model: L = 4 layers, width h = 16, n = 4 heads and g = 2
groups of d = 6, f = 20, S = 12 positions, 61 ids padded for T = 2 ranks to V = 64.
"""

import json

import pytest
import torch

from ckpt.megatron.test_round_trip import native, sizes  # noqa: F401 (native is a fixture)
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.dist_format.metadata import read_metadata
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import open_checkpoint

LAYER = """
self_attention.linear_qkv.layer_norm_weight   16
self_attention.linear_qkv.weight              24 16
self_attention.linear_proj.weight             16 12
mlp.linear_fc1.layer_norm_weight              16
mlp.linear_fc1.weight                         20 16
mlp.linear_fc2.weight                         16 10
self_attention.linear_qkv._extra_state        0
self_attention.linear_proj._extra_state       0
self_attention.core_attention._extra_state    0
mlp.linear_fc1._extra_state                   0
mlp.linear_fc2._extra_state                   0
"""
"""On a rank: (n + 2g)·d/T = 24 rows of QKV, n·d/T = 12 columns of the projection, 2f/T = 20 rows of fc1, f/T = 10."""
FIRST = "embedding.word_embeddings.weight 32 16"
LAST = """
decoder.final_layernorm.weight        16
decoder.final_layernorm._extra_state  0
output_layer.weight                   32 16
output_layer._extra_state             None
"""
LOCAL = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
STACKED = """
embedding.word_embeddings.weight                              64 16    1
decoder.layers.self_attention.linear_qkv.layer_norm_weight    4 16     4
decoder.layers.self_attention.linear_qkv.weight               4 48 16  4
decoder.layers.self_attention.linear_proj.weight              4 16 24  4
decoder.layers.mlp.linear_fc1.layer_norm_weight               4 16     4
decoder.layers.mlp.linear_fc1.weight                          4 40 16  4
decoder.layers.mlp.linear_fc2.weight                          4 16 20  4
decoder.final_layernorm.weight                                16       1
output_layer.weight                                           64 16    1
"""
"""Key, whole size and number of chunks: a layer each."""
OF_EXPERTS = """
decoder.layers.pre_mlp_layernorm.weight                       4 16        4
decoder.layers.mlp.router.weight                              4 3 16      4
decoder.layers.mlp.experts.experts.linear_fc1.weight          4 3 40 16   12
decoder.layers.mlp.experts.experts.linear_fc2.weight          4 3 16 20   12
"""
OBJECTS = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")


def rows(table):
    """Lines of a table → name to the rest."""
    return {name: rest for name, *rest in (line.split() for line in table.strip().splitlines())}


@pytest.fixture
def written(native, tmp_path):  # noqa: F811
    """`written(target_ckpt_format="torch_dist")` → the source's tensors, and the directory."""

    def write(changes=None, **options):
        source = native(**changes or {})
        convert("native", source, "core", tmp_path / "core", options=sizes(2, 2) | options)
        return dict(open_checkpoint(source).tensors()), tmp_path / "core"

    return write


def files_below(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("implementation", ["transformer_engine", "local"])
def test_torch_has_the_files_keys_and_shapes_of_the_specification(implementation, written):
    _, directory = written(saver_transformer_impl=implementation)
    ranks = [f"release/mp_rank_{t:02d}_{p:03d}/model_optim_rng.pt" for t in (0, 1) for p in (0, 1)]
    assert files_below(directory) == ["latest_checkpointed_iteration.txt", *ranks]
    for rank in ranks:
        state = safe_unpickle.read(directory / rank)
        assert state.keys() == {
            "args",
            "checkpoint_version",
            "iteration",
            "model",
            "num_floating_point_operations_so_far",
        }
        assert state["checkpoint_version"] == 3.0
        stage = rows(FIRST) if "_000/" in rank else rows(LAST)
        right = stage | {f"decoder.layers.{n}.{name}": shape for n in (0, 1) for name, shape in rows(LAYER).items()}
        if implementation == "local":
            of_engine = ("core_attention._extra_state", "layernorm._extra_state")
            right = {_local(name): shape for name, shape in right.items() if not name.endswith(of_engine)}
            right = {name: ["None"] if "_extra_state" in name else shape for name, shape in right.items()}
        shapes = {name: ["None"] if v is None else [str(n) for n in v.shape] for name, v in state["model"].items()}
        assert shapes == right


def _local(name):
    for theirs, local in LOCAL.items():
        name = name.replace(theirs, local)
    return name


def test_torch_has_the_layouts_of_the_specification(written):
    source, directory = written()
    parts = {name: source[f"layers.3.{name}.weight"] for name in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")}
    state = safe_unpickle.read(directory / "release/mp_rank_01_001/model_optim_rng.pt")["model"]
    q, k, v = (parts[name].unflatten(0, (2, -1))[1] for name in ("attn.q", "attn.k", "attn.v"))  # the second group
    assert torch.equal(state["decoder.layers.1.self_attention.linear_qkv.weight"], torch.cat([q, k, v]))
    gate, up = (parts[name][10:] for name in ("mlp.gate", "mlp.up"))  # the second half of each
    assert torch.equal(state["decoder.layers.1.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    down, out = source["layers.3.mlp.down.weight"], source["layers.3.attn.out.weight"]
    assert torch.equal(state["decoder.layers.1.mlp.linear_fc2.weight"], down[:, 10:])
    assert torch.equal(state["decoder.layers.1.self_attention.linear_proj.weight"], out[:, 12:])
    head = source["head.weight"]
    assert torch.equal(state["output_layer.weight"], torch.cat([head[32:], head[-1:].expand(3, -1)]))


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_torch_dist_has_the_files_keys_and_sizes_of_the_specification(kind, written):
    mlp = {"kind": "moe", "ffn_hidden_size": 20, "experts": 3, "top_k": 2}
    _, directory = written({"mlp": mlp} if kind == "experts" else {}, target_ckpt_format="torch_dist")
    inside = ["release/.metadata", "release/__0_0.distcp", "release/common.pt", "release/metadata.json"]
    assert files_below(directory) == ["latest_checkpointed_iteration.txt", *inside]
    right, mlp_states = rows(STACKED), [f"mlp.linear_fc{i}._extra_state/shard_{n}_4" for i in (1, 2) for n in range(4)]
    if kind == "experts":
        right = {name: row for name, row in right.items() if ".mlp." not in name} | rows(OF_EXPERTS)
        shards = [f"{n}.{e}_4.3" for n in range(4) for e in range(3)]
        mlp_states = [
            f"mlp.experts.experts.linear_fc{i}._extra_state/shard_{shard}" for i in (1, 2) for shard in shards
        ]
        mlp_states += [f"pre_mlp_layernorm._extra_state/shard_{n}_4" for n in range(4)]
    stored = read_metadata(directory / "release")
    tensors = {key: [*map(str, one.size), str(len(one.chunks))] for key, one in stored.items() if one.size is not None}
    assert tensors == right
    states = [f"{module}._extra_state/shard_{n}_4" for module in OBJECTS for n in range(4)]
    objects = {key for key, one in stored.items() if one.size is None}
    of_layers = {f"decoder.layers.{name}" for name in (*states, *mlp_states)}
    assert objects == of_layers | {"decoder.final_layernorm._extra_state/shard_0_1"}
    assert {json.dumps(stored[key].chunks[0].read()) for key in objects} == {"[null]"}
    common = safe_unpickle.read(directory / "release/common.pt")
    assert common.keys() == {"args", "checkpoint_version", "iteration", "num_floating_point_operations_so_far"}
    mark = {f"{part}_backend{rest}" for part in ("sharded", "common") for rest in ("", "_version")}
    assert json.loads((directory / "release/metadata.json").read_text()).keys() == mark


def test_torch_dist_has_the_layouts_of_the_specification(written):
    """All gate rows, then all up rows; a chunk is a layer, on a leading axis of one.

    Source: docs/specs/checkpoints.md §2.4, §2.5.
    """
    source, directory = written(target_ckpt_format="torch_dist")
    chunks = read_metadata(directory / "release")["decoder.layers.mlp.linear_fc1.weight"].chunks
    for chunk in chunks:
        n, *offsets = chunk.offsets
        gate, up = (source[f"layers.{n}.mlp.{name}.weight"] for name in ("gate", "up"))
        assert (offsets, chunk.sizes) == ([0, 0], (1, 40, 16))
        assert torch.equal(chunk.read(), torch.cat([gate, up])[None])
        assert chunk.file.read_bytes()[chunk.start :].startswith(b"PK\x03\x04")
