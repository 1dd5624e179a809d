"""Command lines of Megatron's README, word for word."""

import pytest

from bad_inputs import run_mt
from ckpt.conftest import bits
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.megatron_flags import translate_flags

README = (
    "--model-type GPT --loader llama_mistral --load-dir {load} --model-size llama3 --checkpoint-type hf --bf16 "
    "--megatron-path /opt/megatron --saver core --target-tensor-parallel-size 2 --target-pipeline-parallel-size 1 "
    "--tokenizer-model {load} --max-queue-size=50 --no-checking --loader-transformer-impl local --save-dir {save}"
)


def convert_as(line, load, save):
    return run_mt("ckpt", "convert", *line.format(load=load, save=save).split())


def test_the_line_of_the_readme_converts(save_model, tmp_path):
    path = save_model("llama")
    done = convert_as(README, path, tmp_path / "megatron")
    assert (done.returncode, done.stderr) == (
        0,
        "note: not needed here, the files say it: --model-size, --checkpoint-type, --megatron-path, --tokenizer-model, "
        "--max-queue-size, --no-checking, --loader-transformer-impl\n",
    )
    assert len([*(tmp_path / "megatron").glob("release/mp_rank_*")]) == 2
    back = "--model-type GPT --loader megatron --load-dir {load} --saver hf --save-dir {save} --fp16"
    assert convert_as(back, tmp_path / "megatron", tmp_path / "hf").returncode == 0
    convert("hf", path, "native", tmp_path / "bf16", dtype="bf16")
    convert("native", tmp_path / "bf16", "hf", tmp_path / "expected", dtype="fp16")
    assert bits(tmp_path / "hf") == bits(tmp_path / "expected")


def test_the_old_classes_are_megatron_too(save_model, tmp_path):
    line = "--model-type GPT --loader hf --load-dir {load} --saver megatron --save-dir {save}"
    assert convert_as(line, save_model("gpt2"), tmp_path / "old").returncode == 0
    back = "--model-type GPT --loader megatron --load-dir {load} --saver mcore --save-dir {save}"
    assert convert_as(back, tmp_path / "old", tmp_path / "new").returncode == 0


def test_what_is_not_the_same_is_answered_at_once(save_model, tmp_path):
    path = save_model("llama")
    line = (
        "--loader megatron --load-dir {load} --saver core --save-dir {save} --vocab-file v.json --bf16 --fp16 "
        "--make-vocab-size-divisible-by 64 --tokenizer-model /elsewhere/t.model --checkpoint-type nemo "
        "--position-embedding-type rope --target-tensor-paralel-size 2"
    )
    done = convert_as(line, path, tmp_path / "out")
    assert done.returncode == 2
    assert not (tmp_path / "out").exists()
    assert [text.removeprefix("mt: ").split(";")[0] for text in done.stderr.splitlines()] == [
        f"--loader megatron: {path} is in hf format",
        "--vocab-file v.json: its length was Megatron's vocabulary",
        "--bf16: with --fp16",
        "--fp16: with --bf16",
        "--make-vocab-size-divisible-by 64: rows are padded to multiples of 128 for each tensor rank",
        "--tokenizer-model /elsewhere/t.model: the tokenizer travels with the files of --load-dir",
        "--checkpoint-type nemo: no type of checkpoint",
        "--position-embedding-type rope: args say it",
        "--target-tensor-paralel-size: neither loader hf nor saver core has it",
    ]


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--bf16"], ["--dtype", "bf16"]),
        (["--bf16", "--dtype", "bf16"], ["--dtype", "bf16"]),
        (["--saver=mcore"], ["--saver", "core"]),
        (["--model-size", "7B", "--verify"], ["--verify"]),
    ],
)
def test_words_become_ours(words, ours):
    assert (translate_flags(words).words, translate_flags(words).problems) == (ours, [])


def test_a_plugins_own_flag_stays():
    assert translate_flags(["--model-size", "7"], ["--model-size"]).words == ["--model-size", "7"]
    (problem,) = translate_flags(["--bf16", "--dtype", "fp32"]).problems
    assert str(problem) == "--bf16: with --dtype fp32; one of them; here it is --dtype bf16"
