"""What is wrong with a checkpoint of Megatron's, or cannot be written as one, is told at once and by name."""

import re
import shutil

import pytest
import torch

from ckpt.megatron.test_round_trip import build_config, native, sizes  # noqa: F401 (native is a fixture)
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.detection import detect_loader
from mt_core.errors import MtError

FILE = "model_optim_rng.pt"


@pytest.fixture
def core(native, tmp_path):  # noqa: F811
    """`core("gpt2", tensor=2)` → a checkpoint for 2 × 2 ranks."""

    def make(model="llama", form="torch", **changes):
        source = native(model, **changes)
        convert("native", source, "core", tmp_path / "core", options={**sizes(2, 2), "target_ckpt_format": form})
        return tmp_path / "core" / "release"

    return make


def edit(path, change):
    """Change what a rank's file holds."""
    state = safe_unpickle.read(path)
    change(state)
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def found(raised):
    return [problem.actual for problem in raised.value.problems]


def test_the_files_are_a_rank_each_and_a_tracker(core):
    directory = core()
    assert sorted(path.name for path in directory.iterdir()) == [
        "mp_rank_00_000",
        "mp_rank_00_001",
        "mp_rank_01_000",
        "mp_rank_01_001",
    ]
    assert (directory.parent / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert detect_loader(directory.parent) == detect_loader(directory) == "core"


def test_a_tied_embedding_is_on_the_last_stage_again(core):
    directory = core("gpt2")
    first, last = (safe_unpickle.read(directory / f"mp_rank_00_{stage:03d}" / FILE)["model"] for stage in (0, 1))
    assert torch.equal(last["output_layer.weight"], first["embedding.word_embeddings.weight"])
    assert "output_layer.weight" not in first
    assert first["embedding.word_embeddings.weight"].shape == (32, 16)  # 61 ids in rows of 8 × 2 ranks: 64


def test_every_missing_rank_is_named(core):
    directory = core()
    shutil.rmtree(directory / "mp_rank_01_000")
    shutil.rmtree(directory / "mp_rank_01_001")
    with pytest.raises(MtError, match="args say 2 tensor ranks and 2 stages: copy it") as raised:
        dict(MegatronCoreLoader(directory).tensors())
    assert len(raised.value.problems) == 2


def test_missing_unexpected_and_misshapen_tensors_are_told_together(core):
    directory = core()

    def change(state):
        model = state["model"]
        model["decoder.layers.0.mlp.linear_fc2.bias"] = model.pop("decoder.layers.0.mlp.linear_fc2.weight")
        model["decoder.layers.1.self_attention.linear_proj.weight"] = torch.ones(3, 3)

    edit(directory / "mp_rank_01_000" / FILE, change)
    with pytest.raises(MtError) as raised:
        dict(MegatronCoreLoader(directory).tensors())
    assert found(raised) == [
        "unexpected tensor",
        "stored by 1 ranks",
        "has shape (3, 3) on tensor rank 1",
    ]


def test_a_copy_of_the_embedding_that_differs_is_refused(core):
    directory = core("gpt2")
    edit(directory / "mp_rank_00_001" / FILE, lambda state: state["model"]["output_layer.weight"].add_(1))
    with pytest.raises(MtError, match="copy of the embedding differs"):
        dict(MegatronCoreLoader(directory).tensors())


def test_arguments_that_mt_lacks_are_told_together(core):
    directory = core()

    def change(state):
        state["args"].mtp_num_layers, state["args"].normalization, state["args"].num_layers = 8, "Odd", None

    edit(directory / "mp_rank_00_000" / FILE, change)
    with pytest.raises(MtError) as raised:
        MegatronCoreLoader(directory).config()
    assert found(raised) == ["args.num_layers is None", "args.mtp_num_layers is 8", "args.normalization is 'Odd'"]


def test_head_counts_that_do_not_fit_are_told(core):
    directory = core()
    edit(directory / "mp_rank_00_000" / FILE, lambda state: setattr(state["args"], "num_query_groups", 3))
    with pytest.raises(MtError, match="args: .*num_kv_heads 3 does not divide heads 4"):
        MegatronCoreLoader(directory).config()


def test_files_without_args_are_refused(core):
    directory = core()
    edit(directory / "mp_rank_00_000" / FILE, lambda state: state.pop("args"))
    with pytest.raises(MtError, match="has no args, which say what the model is"):
        MegatronCoreLoader(directory)


def test_a_file_of_something_else_is_refused(core):
    directory = core()
    torch.save([1], directory / "mp_rank_00_000" / FILE)
    with pytest.raises(MtError, match="holds a list; a file that Megatron saved holds a dict"):
        MegatronCoreLoader(directory)


def test_a_rank_without_its_chunk_is_told(core):
    directory = core()
    edit(directory / "mp_rank_01_001" / FILE, lambda state: state.pop("model"))
    with pytest.raises(MtError, match="a rank lacks model"):
        dict(MegatronCoreLoader(directory).tensors())


def test_the_true_vocabulary_can_be_given(core):
    directory = core()
    assert dict(MegatronCoreLoader(directory, true_vocab_size=60).tensors())["embed.weight"].shape == (60, 16)
    with pytest.raises(
        MtError, match="a true vocabulary of 65 does not fit the embedding; at most padded_vocab_size = 64"
    ):
        MegatronCoreLoader(directory, true_vocab_size=65).config()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("latest_checkpointed_iteration.txt", "soon", "says 'soon'; an iteration or 'release'"),
        ("latest_checkpointed_iteration.txt", "7", "iter_0000007: missing"),
        ("other.txt", "", "holds no latest_checkpointed_iteration.txt"),
    ],
)
def test_a_directory_without_an_iteration_is_told(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(MtError, match=message):
        MegatronCoreLoader(tmp_path)
    with pytest.raises(MtError, match="no such directory"):
        MegatronCoreLoader(tmp_path / "nowhere")


def test_an_iteration_without_files_is_told(tmp_path):
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(MtError, match=r"holds no mp_rank_\*/model_optim_rng.pt"):
        MegatronCoreLoader(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("metadata.json", "missing: its writing was interrupted"),
        ("__0_0.distcp", "__0_0.distcp: missing; .metadata names it"),
        ("common.pt", "holds neither common.pt nor common_state"),
    ],
)
def test_a_directory_of_chunks_that_lacks_a_file_is_told(name, message, core):
    directory = core(form="torch_dist")
    (directory / name).unlink()
    with pytest.raises(MtError, match=message):
        MegatronCoreLoader(directory)


def test_a_truncated_directory_of_chunks_is_told(core):
    directory = core(form="torch_dist")
    (directory / ".metadata").write_bytes((directory / ".metadata").read_bytes()[:100])
    with pytest.raises(MtError, match="truncated or not a directory of chunks"):
        MegatronCoreLoader(directory)


def test_chunks_of_another_model_are_told(core):
    directory = core(form="torch_dist")
    common = safe_unpickle.read(directory / "common.pt")
    common["args"].ffn_hidden_size, common["args"].add_qkv_bias = 24, True
    common["args"].untie_embeddings_and_output_weights = False
    torch.save(common, directory / "common.pt")
    with pytest.raises(MtError) as raised:
        dict(MegatronCoreLoader(directory).tensors())
    assert set(found(raised)) == {
        "tensor is missing",
        "unexpected tensor",
        "has shape (4, 40, 16)",
        "has shape (4, 16, 20)",
    }


def test_a_directory_of_chunks_without_args_is_refused(core):
    directory = core(form="torch_dist")
    torch.save({}, directory / "common.pt")
    with pytest.raises(MtError, match="has no args, which say what the model is"):
        MegatronCoreLoader(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (sizes(3), "attention.heads = 4 does not divide by 3 tensor ranks"),
        (sizes(8), "mlp.ffn_hidden_size = 20 does not divide by 8"),
        (sizes(1, 8), "4 layers do not divide by 8 stages of 1 chunks; stages that fit: 1, 2, 3, 4"),
        (sizes(1, 2, 3), "4 layers do not divide by 2 stages of 3 chunks; stages that fit: none"),
        (sizes(1, 1, 2), "virtual stages without pipeline stages"),
        (sizes(0), "--target-tensor-parallel-size is below 1"),
        ({"target_expert_parallel_size": 2}, "2 expert ranks for a model without experts; leave"),
        ({"target_iteration": 0}, "--target-iteration: 0 is no iteration that Megatron reads"),
        ({"moe_grouped_gemm": True}, "--moe-grouped-gemm: the model has no experts"),
    ],
)
def test_what_cannot_be_written_is_refused(options, message, tmp_path):
    with pytest.raises(MtError, match=re.escape(message)):
        save(tmp_path / "core", build_config(), (), **options)
    assert not (tmp_path / "core").exists()


def test_groups_that_do_not_fit_the_ranks_are_told(tmp_path):
    changes = {"attention": {"heads": 6, "num_kv_heads": 3, "head_size": 2}}
    with pytest.raises(MtError, match="attention.num_kv_heads = 3 and 2 tensor ranks; one must divide the other"):
        save(tmp_path / "core", build_config(**changes), (), **sizes(2))


def test_a_model_without_arguments_in_megatron_is_refused(tmp_path):
    config = build_config(mlp={"kind": "gated", "ffn_hidden_size": 20, "activation": "gelu", "bias": True})
    with pytest.raises(MtError) as raised:
        save(tmp_path / "core", config, ())
    assert found(raised) == ["cannot carry mlp.activation = 'gelu'", "cannot carry mlp.bias = True"]


def test_options_that_no_side_has_or_of_other_values_are_refused_at_once(native, tmp_path):  # noqa: F811
    options = {
        "true_vocab_size": 60,
        "target_ckpt_format": "zarr",
        "saver_transformer_impl": "x",
        "target_iteration": "b",
    }
    with pytest.raises(MtError) as raised:
        convert("native", native(), "core", tmp_path / "core", options=options)
    unknown, *values = map(str, raised.value.problems)
    assert unknown.startswith(
        "--true-vocab-size: neither loader native nor saver core has it; allowed: --target-tensor-parallel-size, "
    )
    assert values == [
        "--target-ckpt-format: 'zarr'; input should be 'torch' or 'torch_dist'",
        "--target-iteration: 'b'; input should be a valid integer, unable to parse string as an integer",
        "--saver-transformer-impl: 'x'; input should be 'transformer_engine' or 'local'",
    ]


def test_the_command_cuts_and_verifies(native, tmp_path):  # noqa: F811
    options = ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2, "--verify"]
    result = mt_ckpt("convert", "--load-dir", native(), "--saver", "core", "--save-dir", tmp_path / "core", *options)
    assert result.exit_code == 0
    assert "verified: source in mt = result in mt" in result.stdout
    assert (tmp_path / "core" / "release" / "mp_rank_01_001" / FILE).is_file()
