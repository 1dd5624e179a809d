"""T5 on several pipeline stages: every cut keeps the bits, and megatron-core's own pieces take and give the files.

Pieces are built one after the other in a process whose groups are made up (torch's `fake` backend): rank and number of
ranks are all that a piece asks for.
"""

import json
from argparse import Namespace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ckpt.megatron.legacy.legacy_checkpoints import random_weights
from ckpt.megatron.test_encoders import BARE_T5, BERT, RELATIVE_T5, T5
from ckpt.megatron.test_encoders_oracle import their_t5
from ckpt.megatron.test_round_trip import read_tensors, sizes
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.legacy.loader import MegatronLegacyLoader
from mt_ckpt.megatron.loader import MegatronCoreLoader
from mt_ckpt.megatron.parameters.pipeline import encoder_stages
from mt_ckpt.megatron.saver import save
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_core.checkpoint.native import write_model
from mt_core.distributed.mesh import Axis
from mt_core.errors import MtError
from mt_core.verification.ranks import run_ranks
from mt_models.config import T5Config

SAVERS = {"core": MegatronCoreLoader, "legacy": MegatronLegacyLoader}
ENCODER = "target_encoder_pipeline_parallel_size"
CUTS = [
    ("core", T5, sizes(2, 5) | {ENCODER: 2}),
    ("core", T5, sizes(1, 2) | {"saver_transformer_impl": "local"}),
    ("core", RELATIVE_T5, sizes(2, 4)),
    ("core", BARE_T5, sizes(1, 5) | {"target_ckpt_format": "torch_dist"}),
    ("legacy", T5, sizes(2, 5)),
    ("legacy", T5, sizes(1, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "config", "options"), CUTS, ids=lambda value: str(value)[:9])
def test_the_same_bits_come_back_from_every_cut(form, config, options, tmp_path):
    weights = random_weights(config, torch.bfloat16)
    write_model(tmp_path / "native", config.model_dump(mode="json"), weights.items())
    convert("native", tmp_path / "native", form, tmp_path / "new", model_type="T5", options=options)
    loader = SAVERS[form](tmp_path / "new")
    assert loader.config() == config
    assert read_tensors(tmp_path / "new") == read_tensors(tmp_path / "native")


@pytest.mark.parametrize(
    ("layers", "decoder_layers", "pipeline", "stages"),
    [(12, 12, 4, 2), (12, 12, 3, 1), (4, 3, 4, 1), (4, 3, 5, 2), (24, 6, 5, 4), (4, 3, 1, 0), (4, 3, 6, 0)],
)
def test_the_encoder_gets_stages_so_that_the_fullest_has_the_fewest_layers(layers, decoder_layers, pipeline, stages):
    config = T5.model_copy(update={"layers": layers, "decoder_layers": decoder_layers})
    assert encoder_stages(config, pipeline, None) == stages
    assert encoder_stages(BERT, pipeline, None) == 0


CANNOT = {
    "no split": (
        T5,
        {"pipeline": 6},
        "4 layers of the encoder and 3 of the decoder do not divide by 6 stages; "
        "--target-pipeline-parallel-size of 2, 3, 4, 5, 7",
    ),
    "another split": (
        T5,
        {"pipeline": 5, "encoder": 3},
        "the decoder do not divide by 3 and 2 stages; --target-encoder-pipeline-parallel-size of 2, 4",
    ),
    "virtual": (T5, {"pipeline": 2, "virtual": 2}, "2 virtual stages of a T5; Megatron interleaves no encoder and"),
    "bert": (
        BERT,
        {"pipeline": 2, "encoder": 1},
        "--target-encoder-pipeline-parallel-size for a model that is no T5; leave it out",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_cuts_that_megatron_has_not_are_refused(case, tmp_path):
    config, given, message = CANNOT[case]
    options: Any = sizes(1, given["pipeline"], given.get("virtual", 1)) | {ENCODER: given.get("encoder")}
    with pytest.raises(MtError, match=message):
        save(tmp_path / "core", config, (), **options)


def change(root: Path, stage: int, edit: Any) -> None:
    """Change one stage's file."""
    path = root / "release" / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    edit(state["model"])
    torch.save(state, path)


@pytest.fixture
def cut(tmp_path):
    """A relative T5 whose encoder has stages 0 and 1, and its decoder stage 2."""
    save(tmp_path / "core", RELATIVE_T5, random_weights(RELATIVE_T5).items(), **sizes(1, 3) | {ENCODER: 2})
    return tmp_path / "core"


def read(root: Path, **args: Any) -> MegatronCoreLoader:
    (root / "args.json").write_text(json.dumps(args))
    loader = MegatronCoreLoader(root, megatron_args=root / "args.json")
    dict(loader.tensors())
    return loader


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"pipeline_model_parallel_split_rank": 2},
        {"encoder_pipeline_model_parallel_size": None, "pipeline_model_parallel_size": 3},
        {"encoder_pipeline_model_parallel_size": 0, "pipeline_model_parallel_size": 3}
        | {"pipeline_model_parallel_split_rank": 2, "encoder_tensor_model_parallel_size": 0},
    ],
    ids=str,
)
def test_every_style_of_args_is_read(args, cut):
    assert read(cut, **args).config() == RELATIVE_T5


def test_args_that_the_files_belie_are_refused(cut):
    for args, message in (
        (
            {"encoder_pipeline_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
            "args give the encoder 1 pipeline stages, and 2 hold layers of it; correct args",
        ),
        (
            {"encoder_tensor_model_parallel_size": 2},
            "args.encoder_tensor_model_parallel_size is 2, tensor_model_parallel_size 1; as many tensor ranks for the",
        ),
    ):
        with pytest.raises(MtError, match=message):
            read(cut, **args)


def test_stages_of_both_or_neither_are_refused_together(cut):
    change(cut, 0, lambda model: model.update({"decoder.layers.0.input_layernorm.weight": torch.ones(16)}))
    change(cut, 1, dict.clear)
    with pytest.raises(MtError) as error:
        read(cut)
    allowed = "; a T5 on several stages has one of the two on each"
    assert [str(problem).partition("release: ")[2] for problem in error.value.problems][:2] == [
        f"pipeline stage 0: holds layers of decoder and encoder{allowed}",
        f"pipeline stage 1: holds layers of neither encoder nor decoder{allowed}",
    ]


def test_stages_whose_copies_differ_are_refused_and_what_they_make_no_use_of_is_ignored(cut):
    head, biases = "output_layer.weight", "{}_relative_pos_emb.relative_attention_bias.weight"
    change(cut, 1, lambda model: (model[head].zero_(), model[biases.format("decoder")].zero_()))
    change(cut, 2, lambda model: model[biases.format("encoder")].zero_())
    assert read(cut).config() == RELATIVE_T5
    change(cut, 1, lambda model: model[biases.format("encoder")].zero_())
    change(cut, 2, lambda model: model["embedding.word_embeddings.weight"].zero_())
    with pytest.raises(MtError) as error:
        read(cut)
    assert [str(problem).partition("release: ")[2] for problem in error.value.problems] == [
        f"{name}: pipeline stages hold different copies of it; the model here has one"
        for name in ("embedding.word_embeddings.weight", biases.format("encoder"))
    ]


def test_a_heads_copy_of_the_embedding_that_differs_is_told(tmp_path):
    save(tmp_path / "core", T5, random_weights(T5).items(), **sizes(1, 4) | {ENCODER: 1})
    change(tmp_path / "core", 3, lambda model: model["lm_head.output_layer.weight"].zero_())
    with pytest.raises(MtError, match="lm_head.output_layer.weight: differs from embedding.word_embeddings.weight"):
        dict(MegatronCoreLoader(tmp_path / "core").tensors())


def test_stages_are_told_as_megatron_0_8_to_0_11_have_them(cut):
    args = safe_unpickle.read(cut / "release/mp_rank_00_002/model_optim_rng.pt")["args"]
    assert (args.encoder_pipeline_model_parallel_size, args.pipeline_model_parallel_size) == (2, 1)
    assert (args.encoder_tensor_model_parallel_size, args.tensor_model_parallel_size) == (1, 1)


ORACLE: dict[str, tuple[T5Config, int, int, int]] = {
    "tied": (BARE_T5.model_copy(update={"vocab_size": 64}), 1, 4, 3),
    "tied, few stages": (BARE_T5.model_copy(update={"vocab_size": 64}), 2, 1, 1),
    "relative": (RELATIVE_T5.model_copy(update={"vocab_size": 64}), 2, 2, 3),
}
"""Model, tensor ranks, and stages of encoder and decoder: first, middle and last ones, and a stack's only one."""


def piece(axis: Axis, config: T5Config, stage: int, encoder: int, decoder: int) -> Any:
    """What megatron-core builds on a stage, as Megatron 0.11 asks it to."""
    return their_t5(
        axis,
        config,
        stages=(encoder, decoder),
        add_encoder=stage < encoder,
        add_decoder=stage >= encoder,
        pre_process=stage in (0, encoder),
        post_process=stage in (encoder - 1, encoder + decoder - 1),
    )


def trained(state: dict[str, Any], stage: int, encoder: int) -> dict[str, Any]:
    """A piece's state, but what the stage neither computes with nor trains is something else."""
    unused = ("output_layer.", "decoder_relative") if stage < encoder else ("encoder_relative",)
    changed = (name for name, value in state.items() if value is not None and any(part in name for part in unused))
    return state | {name: torch.randn_like(state[name]) for name in changed}


def exchange(_: Axis, room: Path) -> None:
    """Each piece takes our file, and is saved with args of today, which tell of no encoder's stages."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.cuda.current_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.cuda = lambda self, *_, **__: self
    dist.destroy_process_group()
    for case, (config, tensor, encoder, decoder) in ORACLE.items():
        for stage, t in product(range(encoder + decoder), range(tensor)):
            world = tensor * (encoder + decoder)
            dist.init_process_group("fake", store=FakeStore(), rank=stage * tensor + t, world_size=world)
            parallel_state.initialize_model_parallel(tensor, encoder + decoder, create_gloo_process_groups=False)
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            model = piece(Axis("tensor", t, tensor), config, stage, encoder, decoder)
            file = Path(f"mp_rank_{t:02d}_{stage:03d}") / "model_optim_rng.pt"
            ours = safe_unpickle.read(room / case / "ours/release" / file)
            model.load_state_dict(ours["model"], strict=True)
            values = {name: value for name, value in vars(ours["args"]).items() if not name.startswith("encoder_")}
            args = Namespace(**values | {"pipeline_model_parallel_size": encoder + decoder})
            args.encoder_num_layers = config.layers
            (room / case / "theirs" / file).parent.mkdir(parents=True)
            state = trained(model.state_dict(), stage, encoder)
            torch.save({"args": args, "checkpoint_version": 3.0, "model": state}, room / case / "theirs" / file)
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@cache
def room() -> Path:
    """Our checkpoints, and theirs."""
    pytest.importorskip("megatron.core")
    path = Path(mkdtemp())
    for case, (config, tensor, encoder, decoder) in ORACLE.items():
        options: Any = sizes(tensor, encoder + decoder) | {ENCODER: encoder, "saver_transformer_impl": "local"}
        save(path / case / "ours", config, random_weights(config).items(), **options)
        (path / case / "theirs").mkdir()
    run_ranks(1, exchange, path)
    return path


@pytest.mark.parametrize("case", ORACLE)
def test_megatrons_pieces_take_ours_and_we_read_theirs(case):
    config = ORACLE[case][0]
    loader, right = MegatronCoreLoader(room() / case / "theirs"), random_weights(config)
    assert loader.config() == config
    tensors = dict(loader.tensors())
    assert tensors.keys() == right.keys()
    assert all(torch.equal(tensors[name], right[name]) for name in right)
