"""What does not fit between a task's data, the model and the checkpoint is refused, with what would."""

import pytest
import torch
from torch import nn

from eval.finetuning.task_files import PARTS, SIZES, write_tsv
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_eval.finetuning.examples import EncodedExamples, Example, Lengths
from mt_eval.finetuning.predictions import predict, read_predictions
from mt_eval.finetuning.recipe import check_model
from mt_eval.finetuning.sections import GLUEData, RACEData, build_glue, list_problems
from mt_eval.finite import NonFiniteOutput
from mt_models.canonical import canonical_state, fit_heads, load_stream
from mt_models.config import BertConfig
from tiny import gpt2

TASK = {"lm_head": False, "binary_head": False, "task_head": {"kind": "classification", "classes": 2}}
TOKENIZER = TokenizerConfig(type="bytes")


def bert(**changes):
    return BertConfig.model_validate(SIZES | PARTS | {"vocab_size": 32} | TASK | changes)


def glue(*train, **changes):
    values = {"task": "rte", "train_paths": train, "seq_length": 16, "epoch_samples": 1, "tokenizer": TOKENIZER}
    return GLUEData.model_validate(values | changes)


def problems(data, model):
    return [str(problem) for problem in list_problems(data, model)]


def test_data_that_the_model_can_use_has_no_problem(tmp_path):
    assert problems(glue(str(tmp_path)), bert()) == []


def test_data_and_head_must_fit(tmp_path):
    assert problems(glue("none.tsv", tokenizer=None), bert(task_head={"kind": "multiple_choice"}, token_types=0)) == [
        "data.tokenizer: is not given; the checkpoint's tokenizer, or another of the same vocabulary",
        "data.train_paths: no file or folder none.tsv; check the path",
        "model.task_head: {'kind': 'multiple_choice'}, but samples of data.kind = 'glue' need {'kind': "
        "'classification', 'classes': 2}; as mt task",
    ]
    assert problems(glue(), bert(token_types=1)) == [
        "data.train_paths: is empty; at least one file or folder",
        "model.token_types: 1, but pairs of texts have tokens of two types; allowed: 0, or 2 and more",
    ]
    race = RACEData(train_paths=(str(tmp_path),), seq_length=16, epoch_samples=1, max_qa_length=13, tokenizer=TOKENIZER)
    assert problems(race, gpt2()) == [
        "data.max_qa_length: 13 leaves no room for the passage in data.seq_length = 16; allowed: at most 12",
        "model.task_head: none, but samples of data.kind = 'race' need {'kind': 'multiple_choice'}; as mt task",
    ]


def test_an_epoch_has_no_more_samples_than_there_are_examples(tmp_path):
    file = write_tsv(tmp_path / "a.tsv", ("index", "sentence1", "sentence2", "label"), ("0", "a", "b", "entailment"))
    with pytest.raises(MtError, match="data.epoch_samples: 2, but there are 1 training examples; at most 1"):
        build_glue(glue(str(file), epoch_samples=2), samples=(2, 0, 0), seed=0, cache_dir=tmp_path)


def test_only_a_bert_is_fine_tuned(tmp_path):
    with pytest.raises(MtError, match="here: holds a model of kind 'gpt'; a BERT, in any format that a loader reads"):
        check_model(gpt2(), "here")


def test_heads_that_a_checkpoint_lacks_or_has_otherwise_are_drawn_from_the_seed():
    pretrained = bert(lm_head=True, binary_head=True, pooler=True, task_head=None).build()
    pretrained.initialize(3)
    notes = []
    model = bert().build()
    load_stream(model, fit_heads(model, canonical_state(pretrained).items(), 7, notes.append))
    assert notes == ["drawn from the seed: task_head", "left out of the checkpoint: binary_head, head, lm_head"]
    ours, theirs = canonical_state(model), canonical_state(pretrained)
    assert torch.equal(ours["task_head.weight"], model.initial(7, "task_head.weight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
    same, other, notes = bert().build(), bert(task_head={"kind": "classification", "classes": 3}).build(), []
    load_stream(same, fit_heads(same, ours.items(), 8, notes.append))
    assert (notes, torch.equal(canonical_state(same)["task_head.weight"], ours["task_head.weight"])) == ([], True)
    load_stream(other, fit_heads(other, ours.items(), 8, notes.append))
    assert notes == ["drawn from the seed: task_head", "left out of the checkpoint: task_head"]
    with pytest.raises(MtError, match="task_head.weight: unexpected tensor of shape"):
        load_stream(pretrained, fit_heads(pretrained, ours.items(), 7, notes.append))


class Words:
    cls, sep, pad = 1, 2, 0

    def encode_batch(self, texts):
        return [[len(text)] for text in texts]


class Broken(nn.Module):
    """Finite logits but for a text of three letters."""

    def forward(self, tokens_BT, types_BT, padding_mask_BT):
        scores_B = torch.where((tokens_BT == 3).any(1), torch.nan, 1.0)
        return torch.stack([scores_B, scores_B], 1)


def test_an_example_without_finite_logits_is_named():
    examples = [Example(text, ((text, None),)) for text in ("a", "four", "abc")]
    samples = EncodedExamples(examples, Words(), Lengths(4))
    with pytest.raises(NonFiniteOutput, match="example abc: the model computes a logit that is not finite here"):
        predict(Broken(), samples, ["0", "1"], batch_size=2, device=torch.device("cpu"))


def test_an_empty_file_is_no_predictions(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(MtError, match=r"a.jsonl: is empty; a file that mt task wrote"):
        read_predictions(tmp_path / "a.jsonl")
