"""Which loader is chosen where none is named: each recognises its own files, and no other's."""

import pytest

from ckpt.test_ckpt_command import mt_ckpt
from mt_core.checkpoint.detection import detect_loader, open_checkpoint, recognising_loaders
from mt_core.errors import MtError


def test_each_format_is_recognised_by_its_files(save_model, native):
    step = native / "step-00000000"
    assert [detect_loader(path) for path in (save_model("gpt2"), native, step)] == ["hf", "native", "native"]


@pytest.mark.parametrize(
    ("files", "loader"),
    [
        (["params.json", "consolidated.00.pth"], "llama_mistral"),
        (["params.json", "config.json"], "hf"),
        (["latest_checkpointed_iteration.txt"], "core"),
        (["mp_rank_00/model_optim_rng.pt"], "core"),
        (["metadata.json", ".metadata"], "core"),
        (["meta.json"], "native"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_names_of_files_are_enough(files, loader, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert recognising_loaders(tmp_path) == [loader]


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_path_that_no_loader_recognises_says_what_each_looked_for(name, tmp_path):
    actual = "no such directory" if name else "holds no checkpoint of a known format"
    looked_for = r"looked for core: latest_checkpointed_iteration.txt or .*; hf: config.json; .*native: meta.json or"
    with pytest.raises(MtError, match=f"{actual}; {looked_for}"):
        open_checkpoint(tmp_path / name)


def test_a_path_that_several_loaders_recognise_must_be_given_with_one(save_model):
    path = save_model("llama")
    (path / "params.json").touch()
    (path / "consolidated.00.pth").touch()
    with pytest.raises(MtError, match="several loaders recognise it: hf, llama_mistral; choose one .* --loader NAME"):
        open_checkpoint(path)
    assert open_checkpoint(path, "hf").config().kind == "gpt"


@pytest.mark.parametrize(
    "words",
    [
        "inspect PATH",
        "diff PATH PATH",
        "verify PATH PATH",
        "average PATH PATH --save-dir RESULT",
        "upcycle PATH --save-dir RESULT --experts 2",
        "convert --load-dir PATH --saver hf --save-dir RESULT",
        "convert-format --load-dir PATH --save-dir RESULT --to torch",
        "push PATH org/name",
    ],
    ids=lambda words: words.split()[0],
)
def test_every_command_asks_the_installed_loaders(words, native, tmp_path, add_component):
    add_component("ckpt-loader", "text", "ckpt.faulty_plugins:RecognisesText")
    (native / "names.txt").touch()
    paths = {"PATH": native, "RESULT": tmp_path / "result"}
    with pytest.raises(MtError, match="several loaders recognise it: native, text; choose one"):
        mt_ckpt(*(paths.get(word, word) for word in words.split()))


def test_a_third_partys_loader_is_chosen_by_what_it_recognises(tmp_path, add_component):
    add_component("ckpt-loader", "text", "ckpt.faulty_plugins:RecognisesText")
    (tmp_path / "names.txt").touch()
    assert detect_loader(tmp_path) == "text"


def test_a_loader_that_fails_to_look_keeps_no_other_from_reading(native, tmp_path, add_component):
    add_component("ckpt-loader", "fails", "ckpt.faulty_plugins:FailsToLook")
    assert detect_loader(native) == "native"
    with pytest.raises(MtError, match="known format; looked for .*; loader fails failed: ZeroDivisionError"):
        detect_loader(tmp_path)
