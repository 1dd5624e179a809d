"""Completion in the shell: the protocol that the installed script speaks, and the script itself in bash."""

import os
import shutil
import subprocess

import pytest


def completions(mt, line: str, **variables: object) -> list[str]:
    """What bash would offer for the last word of `line`."""
    words = line.split(" ")
    ran = mt(_MT_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=len(words) - 1, **variables)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mt c", ["ckpt", "config"]),
        (
            "mt ",
            [
                "ckpt",
                "config",
                "data",
                "eval",
                "generate",
                "plan",
                "plugins",
                "serve",
                "serve-client",
                "task",
                "train",
                "verify",
            ],
        ),
        (
            "mt ckpt ",
            ["average", "convert", "convert-format", "diff", "inspect", "prune", "pull", "push", "upcycle", "verify"],
        ),
        ("mt config s", ["schema", "show"]),
        ("mt data pre", ["preprocess"]),
        ("mt eval l", ["lambada"]),
        ("mt eval ", ["harness", "lambada", "masked-lm", "perplexity", "qa", "span", "wikitext103"]),
        ("mt ckpt convert --load", ["--load-dir", "--loader"]),
        ("mt ckpt convert --ta", []),
        ("mt ckpt convert --loader legacy --saver hf --ta", ["--target-model-type"]),
        ("mt ckpt convert --load-dir . --saver legacy --true", []),
        ("mt ckpt convert --loader lla", ["llama_mistral"]),
        ("mt ckpt convert --loader ", ["core", "hf", "hub", "legacy", "llama_mistral", "mixtral_hf", "native"]),
        ("mt ckpt convert --loader hf --saver na", ["native"]),
        ("mt ckpt convert --dtype b", ["bf16"]),
        ("mt train run.toml --preset gpt2", ["gpt2-124m"]),
        ("mt config show --preset llama", ["llama2-7b", "llama3-8b"]),
        ("mt data preprocess --tokenizer-type H", ["HuggingFaceTokenizer"]),
        ("mt train run.toml --set optim.l", ["optim.lr="]),
        ("mt config show --set model.mlp.aux", ["model.mlp.aux_loss_coeff=", "model.mlp.aux_loss_scope="]),
        ("mt plan --set parallel.seq", ["parallel.sequence="]),
        ("mt verify --set lr_schedule.min", ["lr_schedule.min_lr=", "lr_schedule.min_lr_fraction="]),
        ("mt data plan --set batch.micro", ["batch.micro_batch="]),
        ("mt eval lambada --loader n", ["native"]),
        ("mt generate --loader hf --device c", ["cpu", "cuda"]),
    ],
)
def test_names_complete(mt, line, expected):
    assert sorted(completions(mt, line)) == expected


def test_completing_imports_no_torch(mt, blocking):
    path = blocking("torch", "numpy")
    assert completions(mt, "mt ckpt convert --loader h", PYTHONPATH=path) == ["hf", "hub"]
    assert completions(mt, "mt ckpt convert --loader hf --true-vocab-size 1 --saver co", PYTHONPATH=path) == ["core"]
    assert completions(mt, "mt eval lambada --tokenizer-type b", PYTHONPATH=path) == ["bytes"]


def test_summaries_are_shown_where_the_shell_can(mt):
    ran = mt(_MT_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="mt config show --preset gpt2")
    assert '"gpt2-124m":"GPT-2 small"' in ran.stdout


def test_a_third_party_s_names_complete(mt, plugin):
    head = "from mt_core.plugins import Component, hookimpl\n@hookimpl\ndef mt_components():\n"
    path = plugin("mt-x", head + '    return [Component("ckpt-loader", "mine", "mt_x:load", "Mine")]\n')
    assert completions(mt, "mt ckpt convert --loader min", PYTHONPATH=path) == ["mine"]


def test_a_command_that_cannot_be_imported_completes_to_nothing(mt, plugin):
    head = "from mt_core.plugins import Component, hookimpl\n@hookimpl\ndef mt_components():\n"
    path = plugin("mt-x", head + '    return [Component("command", "x", "no_such_package:x", "X")]\n')
    assert completions(mt, "mt x a", PYTHONPATH=path) == []


def test_the_installed_script_completes_in_bash(mt_executable, tmp_path):
    """`mt --install-completion` finds the shell that it runs in; a new bash reads .bashrc and completes."""
    bash = shutil.which("bash")
    if not bash:
        pytest.skip("no bash on this machine")
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{mt_executable.parent}:{os.environ['PATH']}"}

    def shell(script: str) -> str:
        words = [bash, "--norc", "-c", script]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "bash completion installed" in shell("mt --install-completion; exit $?")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".bash_completions", ".bashrc"]
    typed = "COMP_WORDS=(mt ckpt convert --loader lla); COMP_CWORD=4"
    assert shell(f'. "$HOME/.bashrc"; {typed}; _mt_completion mt; echo "${{COMPREPLY[@]}}"') == "llama_mistral\n"
    assert "_mt_completion mt" in shell('. "$HOME/.bashrc"; complete -p mt')
