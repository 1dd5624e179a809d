"""A training state in every format: the same bits, and a run that goes on as if it had never been moved."""

import shutil
import tomllib
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ckpt.megatron.test_encoders import MODELS as ENCODERS
from ckpt.megatron.test_round_trip import build_config
from cli.test_train_encoders import run_file
from models.encoders import bert, t5
from mt_ckpt.command import app
from mt_ckpt.conversion.convert import convert
from mt_ckpt.megatron.optimizer import KINDS
from mt_ckpt.megatron.torch_format import safe_unpickle
from mt_ckpt.megatron.training_state.convert import Target, convert_format
from mt_ckpt.megatron.training_state.read_native import read_native
from mt_ckpt.tensor_streams.streams import DTYPES
from mt_cli.run_config import load_run_config
from mt_cli.train.compose import run
from mt_core.checkpoint.native import step_directory
from mt_core.checkpoint.step_writer import write
from mt_core.errors import MtError
from tiny import byte_corpus, metrics, run_toml

RUN = {
    "optim": {
        "name": "adamw",
        "lr": 3e-3,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": 1.0,
    },
    "train": {"steps": 50},
    "lr_schedule": {"warmup_steps": 4, "decay": "cosine", "min_lr": 1e-4},
    "batch": {"micro_batch": 2, "global_batch": 4},
    "data": {"kind": "mock", "seq_length": 8},
    "runtime": {"seed": 5},
}
EXPERTS: dict[str, Any] = {
    "mlp": {"kind": "moe", "ffn_hidden_size": 8, "experts": 4, "top_k": 2, "normalized": True, "aux_loss_coeff": 0.0}
}
LATENT: dict[str, Any] = {
    "attention": {
        **{"kind": "mla", "heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8},
        **{"nope_head_size": 6, "rope_head_size": 4, "v_head_size": 5},
    },
    "mlp": EXPERTS["mlp"]
    | {"score": "sigmoid", "expert_bias": True, "shared_ffn_hidden_size": 6, "shared_gate": True}
    | {"dense_layers": 1, "dense_ffn_hidden_size": 12},
}
MODELS: dict[str, Any] = ENCODERS | {"experts": build_config(**EXPERTS), "latent experts": build_config(**LATENT)}
START = {"value": 1.0, "good_steps": 0, "overflows_left": 0}
CUT: dict[str, Any] = {"tensor": 2, "pipeline": 2}
TARGETS = {
    "torch": Target("torch"),
    "torch, cut": Target("torch", **CUT),
    "torch, tensor": Target("torch", tensor=2),
    "torch, chunks": Target("torch", **CUT, virtual=2),
    "torch, local names": Target("torch", **CUT, implementation="local"),
    "torch, plain": Target("torch", **CUT, optimizer="plain"),
    "torch, experts": Target("torch", **CUT, expert=2),
    "torch, grouped": Target("torch", pipeline=2, virtual=2, expert=2, grouped=True),
    "torch, plain experts": Target("torch", expert=4, optimizer="plain", implementation="local"),
    "torch_dist": Target("torch_dist"),
    "torch_dist of 0.11, experts": Target("torch_dist", expert=2, optimizer="fully_sharded_model_space"),
    "torch_dist, plain experts": Target("torch_dist", expert=2, optimizer="plain"),
    "torch_dist of 0.11": Target("torch_dist", **CUT, optimizer="fully_sharded_model_space"),
    "torch_dist, plain": Target("torch_dist", optimizer="plain"),
}


def write_run(path: Path, model: Any = "llama", dtype: str = "bf16", *, seed: int = 0, **changes: Any) -> Path:
    """Step 7 of a run at `path`, with random moments; bf16 weights are rounded from their masters.

    `model` is a configuration or the name of one.
    """
    config = MODELS.get(model) or build_config(model, **changes) if isinstance(model, str) else model
    random = torch.Generator().manual_seed(seed)
    shapes = config.canonical_shapes()
    kinds = {kind: {n: torch.randn(s, generator=random) for n, s in shapes.items()} for kind in KINDS}
    biases = {name: kinds[kind].pop(name) for name in shapes if name.endswith("router.bias") for kind in KINDS}
    kinds["exp_avg_sq"] = {name: value.square() for name, value in kinds["exp_avg_sq"].items()}
    weights = {name: master.to(DTYPES[dtype]) for name, master in kinds["master"].items()} | biases
    optim = {f"{k}.{n}": t for k, ts in kinds.items() for n, t in ts.items() if k != "master" or dtype != "fp32"}
    with torch.device("meta"):
        built = config.build()
    firsts = [next(iter(built.canonical_regions(name))) for name, _ in built.named_parameters()]
    optim |= {f"step.{name}": torch.tensor(7.0) for name in firsts}
    scale = {"value": 2.0**16, "good_steps": 3, "overflows_left": 1} if dtype == "fp16" else START
    config = {"model": config.model_dump(mode="json"), "precision": {"dtype": dtype}, **RUN}
    meta = {"step": 7, "samples": 28, "tokens": 200, "loss_scale": scale, "config": config}
    write(step_directory(path, 7), {"model": weights.items(), "optim": optim.items()}, meta)
    return path


@pytest.fixture
def native(tmp_path):
    """`native("gpt2")` → a native run."""
    return partial(write_run, tmp_path / "run")


def contents(path: Path) -> dict[str, Any]:
    """Every tensor of a native checkpoint, as bytes, and its counts."""
    state = read_native(path)
    kinds = {"model": state.weights, **state.optimizer}
    tensors: dict[str, Any] = {
        f"{kind} {n}": (t.dtype, t.contiguous().view(torch.uint8).tolist()) for kind, s in kinds.items() for n, t in s()
    }
    return tensors | {
        n: getattr(state, n)
        for n in ("iteration", "samples", "tokens", "optimizer_steps", "groups", "scheduler", "grad_scaler")
    }


CASES = [
    *(("experts" if "experts" in target or "grouped" in target else "llama", "bf16", target) for target in TARGETS),
    ("gpt2", "fp16", "torch, cut"),
    ("gpt2", "fp32", "torch, plain"),
]
CASES += [
    ("llama tied", "fp16", "torch, local names"),
    ("llama tied", "bf16", "torch_dist"),
    ("gpt2", "fp32", "torch_dist, plain"),
]
CASES += [
    ("experts", "bf16", "torch, cut"),
    ("experts", "fp16", "torch_dist"),
    ("bert", "bf16", "torch, chunks"),
    ("plain bert", "fp32", "torch, plain"),
    ("relative t5", "fp16", "torch, tensor"),
    ("t5", "bf16", "torch_dist, plain"),
]
CASES += [
    ("latent experts", "bf16", "torch, experts"),
    ("latent experts", "fp32", "torch, plain experts"),
    ("latent experts", "fp16", "torch_dist of 0.11, experts"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "dtype", "target"), CASES)
def test_there_and_back_every_bit_and_count_is_the_same(model, dtype, target, native, tmp_path):
    source = native(model, dtype)
    convert_format(source, tmp_path / "there", TARGETS[target], verify=True)
    convert_format(tmp_path / "there", tmp_path / "back", Target("native"), verify=True)
    assert contents(tmp_path / "back") == contents(source)


def write_toml(room: Path, model: str) -> Path:
    """The run of a model, on data of its kind."""
    if model in ENCODING:
        return run_file(room, ENCODING[model])
    sections = {"model": EXPERTS} if model == "experts" else {}
    return run_toml(room / "run.toml", byte_corpus(room / "bytes_text_document"), room / "run", **sections)


ENCODING: dict[str, Any] = {
    "bert": bert(layers=2, vocab_size=32),
    "t5": t5(
        layers=1,
        decoder_layers=1,
        vocab_size=32,
        attention={"heads": 4, "num_kv_heads": 4, "head_size": 6},
        mlp={"kind": "gated", "ffn_hidden_size": 48, "activation": "silu"},
    ),
}
SIX_STEPS = ["checkpoint.every=3", "train.steps=6", "train.eval_every=0", "precision.dtype=fp32", "log.every=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(model)` → a directory with run.toml, `run`, unbroken for six steps, and `half`, stopped after three."""

    @cache
    def make(model: str) -> Path:
        room = tmp_path_factory.mktemp("trained")
        assert run(load_run_config([write_toml(room, model)], SIX_STEPS)) == 0
        (room / "half").mkdir()
        shutil.copytree(step_directory(room / "run", 3), step_directory(room / "half", 3))
        return room

    return make


MOVED = [("gpt", target) for target in ("torch, cut", "torch_dist", "torch_dist of 0.11")]
MOVED += [("bert", "torch, cut"), ("t5", "torch, tensor"), ("experts", "torch, experts")]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "target"), MOVED)
def test_a_moved_run_goes_on_as_if_it_had_stayed(model, target, trained, tmp_path):
    there, room = replace(TARGETS[target], pipeline=None), trained(model)
    convert_format(room / "half", tmp_path / "there", there)
    convert_format(tmp_path / "there", tmp_path / "back", Target("native"))
    files = [tmp_path / "back" / "settings.toml", room / "run.toml"]
    assert run(load_run_config(files, [*SIX_STEPS, f"runtime.run_dir={tmp_path / 'back'}"])) == 0
    assert metrics(tmp_path / "back") == metrics(room / "run")[3:]
    assert contents(tmp_path / "back") == contents(room / "run")


def reported(source: Path, result: Path, *options: str) -> list[str]:
    """What the command prints."""
    done = CliRunner().invoke(app, ["convert-format", "--load-dir", str(source), "--save-dir", str(result), *options])
    assert done.exit_code == 0, done.exception
    return done.stdout.splitlines()


def test_the_report_names_what_is_and_is_not_carried(native, tmp_path):
    there, back = tmp_path / "there", tmp_path / "back"
    assert reported(native(), there, "--to", "torch_dist") == [
        f"wrote {there}: torch_dist, from native",
        "carried: weights, master weights, both moments, scheduler, 2 parameter groups",
        "position: iteration 7, 28 samples, 7 optimizer steps",
        "not carried: the state of random generators: mt draws from the seed and the step, so there is none",
        "to go on: start Megatron with --no-load-rng",
    ]
    assert reported(there, back, "--to", "native", "--verify")[3:] == [
        f"to go on: mt train {back}/settings.toml RUN.toml --set runtime.run_dir={back}  (RUN.toml: your data)",
        "verified: every tensor and count is read back as it was",
    ]


def change(path: Path, args: dict[str, Any], **values: Any) -> None:
    """Other arguments, and other values beside them, in a torch_dist checkpoint."""
    file = path / "iter_0000007" / "common.pt"
    common = safe_unpickle.read(file) | values
    vars(common["args"]).update(args)
    file.unlink()
    torch.save(common, file)


def test_what_megatron_says_and_mt_cannot_is_named(native, tmp_path):
    convert_format(native(), tmp_path / "there", Target("torch_dist"))
    rates = {"max_lr": 1.0, "min_lr": 0.0, "lr_warmup_steps": 3, "num_steps": 28, "lr_decay_steps": 100}
    rates |= {"lr_decay_style": "other", "start_wd": 0.1, "end_wd": 0.2}
    args = {"optimizer": "muon", "mt_trained_tokens": None, "rampup_batch_size": [1, 1, 8]}
    change(tmp_path / "there", args, opt_param_scheduler=rates, rerun_state_machine={"state": 1})
    done = convert_format(tmp_path / "there", tmp_path / "back", Target("native"))
    for line in (
        "the optimizer muon: mt goes on with AdamW",
        "the state of the machinery that repeats failed steps (rerun_state_machine)",
        "the growing batch: set batch.rampup",
        "the decay other of the learning rate: set lr_schedule.decay",
        "the growing weight decay: set optim.weight_decay",
        "the number of trained tokens, which Megatron does not count: taken as 224",
    ):
        assert line in done.lost
    settings = tomllib.loads((tmp_path / "back" / "settings.toml").read_text())["lr_schedule"]
    assert {name: count for name, count in settings.items() if name.startswith(("warmup", "decay_"))} == {
        "warmup_samples": 3,
        "decay_samples": 100,
    }


WRONG = {
    "format": (Target("zarr"), "--to: unknown format 'zarr'; allowed: torch, torch_dist, native"),
    "optimizer": (Target("torch", optimizer="fully_sharded_model_space"), "with --to torch: distributed, plain"),
    "names": (Target("torch", implementation="apex"), "--saver-transformer-impl: unknown name 'apex'"),
    "cut native": (Target("native", tensor=2), "native checkpoints know no layout: leave it out"),
    "the same": (Target("native"), "is in native format already; --to torch or torch_dist"),
    "cut": (Target("torch", tensor=3), "attention.heads = 4 does not divide by 3 tensor ranks"),
}
NO_EXPERTS = "pipeline stage 0{} has no experts, which 2 ranks share elsewhere; fewer stages or one expert rank; or mt"


@pytest.mark.parametrize("case", WRONG)
def test_a_target_that_cannot_be_is_refused(case, native, tmp_path):
    target, message = WRONG[case]
    with pytest.raises(MtError, match=message.replace(".", r"\.")):
        convert_format(native(), tmp_path / "there", target)
    assert not (tmp_path / "there").exists()


def test_experts_that_only_some_stages_share_are_refused(native, tmp_path):
    """Which optimizers Megatron saves on a stage without experts is not known."""
    source = native("latent experts")
    with pytest.raises(MtError, match=NO_EXPERTS.format("")):
        convert_format(source, tmp_path / "there", Target("torch_dist", pipeline=4, expert=2))
    with pytest.raises(MtError, match=NO_EXPERTS.format(", chunk 0")):
        convert_format(source, tmp_path / "there", Target("torch", pipeline=2, virtual=2, expert=2))
    convert_format(source, tmp_path / "there", Target("torch", expert=2))
    for path in [*(tmp_path / "there").rglob("model_optim_rng.pt")]:
        state = safe_unpickle.read(path)
        state["args"].pipeline_model_parallel_size = 4
        for stage in range(4):
            rank = path.parent.with_name(f"mp_rank_00_{stage:03d}_{path.parent.name[-3:]}")
            rank.mkdir()
            torch.save(state, rank / path.name)
        shutil.rmtree(path.parent)
    with pytest.raises(MtError, match=NO_EXPERTS.format("")):
        convert_format(tmp_path / "there", tmp_path / "back", Target("native"))


def test_a_master_that_does_not_round_to_its_weight_is_named(native, tmp_path):
    convert_format(native(), tmp_path / "there", Target("torch"))
    file = tmp_path / "there" / "iter_0000007" / "mp_rank_00" / "distrib_optim.pt"
    vectors = safe_unpickle.read(file)
    next(iter(vectors[0].values()))["param"].add_(1)
    torch.save(vectors, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
    with pytest.raises(MtError, match=r"norm\.weight: its fp32 master does not round to the weight") as err:
        convert_format(tmp_path / "there", tmp_path / "back", Target("native"))
    assert len(err.value.problems) == len(build_config().canonical_shapes())
    assert not (tmp_path / "back").exists()


def test_weights_alone_are_no_training_state(native, tmp_path):
    convert("native", native(), "core", tmp_path / "model")
    with pytest.raises(MtError, match="is a release, which holds a model alone; use mt ckpt convert"):
        convert_format(tmp_path / "model", tmp_path / "there", Target("native"))
    convert("core", tmp_path / "model", "native", tmp_path / "alone")
    with pytest.raises(MtError, match="holds a model alone, no optimizer; use mt ckpt convert"):
        convert_format(tmp_path / "alone", tmp_path / "there", Target("torch"))
    convert("native", tmp_path / "run", "hf", tmp_path / "hf")
    with pytest.raises(MtError, match="is in hf format; training states are in torch, torch_dist, native"):
        convert_format(tmp_path / "hf", tmp_path / "there", Target("torch"))


@pytest.mark.parametrize("target", ["torch", "torch_dist"])
def test_a_checkpoint_without_an_optimizer_is_refused(target, native, tmp_path):
    convert_format(native(), tmp_path / "there", Target(target))
    for file in (tmp_path / "there" / "iter_0000007").rglob("*.pt"):
        state = safe_unpickle.read(file)
        state.pop("optimizer", None)
        torch.save(state, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    with pytest.raises(MtError, match=r"holds no optimizer \(--no-save-optim\?\); use mt ckpt convert for the weights"):
        convert_format(tmp_path / "there", tmp_path / "back", Target("native"))


def test_small_parameters_depend_on_the_buckets_of_the_run_that_loads_them(native, tmp_path):
    hint = "start Megatron without --overlap-grad-reduce, whose buckets would lay the optimizer out differently"
    assert hint in convert_format(native(), tmp_path / "small", Target("torch")).hints
    sizes = {"hidden_size": 64, "mlp": {"kind": "gated", "ffn_hidden_size": 64}}
    attention = {"heads": 4, "num_kv_heads": 2, "head_size": 16}
    aligned = write_run(tmp_path / "aligned", **sizes, attention=attention)
    assert hint not in convert_format(aligned, tmp_path / "large", Target("torch")).hints
