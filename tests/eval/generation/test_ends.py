"""Generation stops at every id that a checkpoint's files call an end, as transformers does."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ckpt.conftest import hugging_face_model
from mt_ckpt.conversion.convert import convert
from mt_cli.main import app
from mt_core.errors import MtError
from mt_eval.load import Checkpoint, read_ends

PROMPTS, NEW = [[5, 6, 7], [20, 9]], 12


def continue_texts(path):
    """New tokens of each prompt in transformers, without the end."""
    model = AutoModelForCausalLM.from_pretrained(path)
    texts = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        ends = model.generation_config.eos_token_id or []
        texts.append([number for number in ids if number not in ends])
    return texts


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory):
    """A model whose two prompts end at different ids, with words for tokens; what transformers continues them with."""
    path = tmp_path_factory.mktemp("ends") / "hf"
    model = hugging_face_model("llama", bos_token_id=None, eos_token_id=None)
    model.save_pretrained(path)
    first, second = continue_texts(path)
    ends = [first[4], next(number for number in second[2:] if number not in first)]
    model.config.eos_token_id = model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(61)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w60"}))
    return path, ends, continue_texts(path)


def generated(path):
    prompts = [word for prompt in PROMPTS for word in ("--prompt", " ".join(f"w{number}" for number in prompt))]
    done = CliRunner().invoke(app, ["generate", str(path), *prompts, "--top-k", "1", "--max-new-tokens", str(NEW)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_text_ends_at_each_of_two_ends_as_in_transformers(two_ends, tmp_path):
    path, ends, texts = two_ends
    assert max(map(len, texts)) < NEW
    convert("hf", path, "native", tmp_path / "native")
    shown = generated(path)
    assert generated(tmp_path / "native") == shown
    (path / "generation_config.json").rename(tmp_path / "settings")
    without_settings = generated(path)  # config.json has the ends too
    (tmp_path / "settings").rename(path / "generation_config.json")
    assert without_settings == shown
    numbers = [[int(word) for word in part.replace("w", " ").split()] for part in shown.split("--- prompt ")[1:]]
    assert [part[1 + len(prompt) :] for part, prompt in zip(numbers, PROMPTS, strict=True)] == texts
    assert read_ends(Checkpoint.open(tmp_path / "native")) == set(ends)


@pytest.mark.parametrize(("content", "problem"), [('{"eos_token_id": "x"}', "is 'x'"), ("[]", "is not a JSON object")])
def test_ends_that_are_no_ids_are_refused(content, problem, two_ends, tmp_path):
    convert("hf", two_ends[0], "native", tmp_path / "native")
    (file,) = (tmp_path / "native").glob("step-*/tokenizer/generation_config.json")
    size = file.stat().st_size
    file.write_text(content.ljust(size))
    with pytest.raises(MtError, match=problem):
        read_ends(Checkpoint.open(tmp_path / "native"))
