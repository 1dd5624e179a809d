"""`--verify` where one of the sides fails: one line that names it, and nothing left behind."""

import json

import pytest
from safetensors.torch import load_file, save_file

from bad_inputs import assert_one_clean_line, run_mt

WEIGHTS = "model.safetensors"


def verify(path, tmp_path, *more):
    done = run_mt("ckpt", "convert", "--load-dir", path, "--saver", "native", "--save-dir", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()
    return done


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"pad_token_id": 99}, "adding_idx"), ({"pretraining_tp": "much"}, "pretraining_tp")],
    ids=["embedding", "type"],
)
def test_what_transformers_raises_is_one_line(change, reason, save_model, tmp_path):
    path = save_model("llama")
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | change))
    for done in (verify(path, tmp_path, "--verify"), run_mt("ckpt", "verify", path, path)):
        assert_one_clean_line(done)
        assert f"mt: {path}: transformers 5" in done.stderr
        assert "cannot compute the model, which mt can: " in done.stderr
        assert reason in done.stderr


def test_ours_is_named_too(save_model, tmp_path):
    path = save_model("llama")
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    done = verify(path, tmp_path, "--verify")
    assert_one_clean_line(done)
    assert f"mt: {path / WEIGHTS}: truncated or not safetensors" in done.stderr


def test_the_comparison_is_named_too(save_model, tmp_path):
    """Not a number equals nothing."""
    path = save_model("llama")
    tensors = load_file(path / WEIGHTS)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    done = verify(path, tmp_path, "--verify")
    assert "Traceback" not in done.stderr
    assert "source in transformers and source in mt disagree" in done.stderr


def test_the_report_of_transformers_on_loading_is_not_shown(save_model, tmp_path, capfd):
    path = save_model("llama", tie_word_embeddings=True)
    tensors = load_file(path / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["model.norm.weight"].clone()
    save_file(tensors, path / WEIGHTS, {"format": "pt"})
    capfd.readouterr()
    done = run_mt("ckpt", "verify", path, path)
    assert done.returncode == 0
    assert capfd.readouterr().err + done.stderr == ""
