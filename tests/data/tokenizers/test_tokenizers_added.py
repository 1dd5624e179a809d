"""Special tokens that tokenizer.json lacks and the files beside it have: ids are those of transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mt_core.errors import MtError
from mt_data.config import GPTData, TokenizerConfig
from mt_data.datasets.gpt.dataset import make_sample_options
from mt_data.preprocess.encoding import EncodingOptions
from mt_data.preprocess.job import PreprocessJob
from mt_data.preprocess.run import preprocess
from mt_data.tokenizers import fingerprint, load_tokenizer
from mt_data.tokenizers.base import NoSuchToken
from mt_data.tokenizers.file_free import BytesTokenizer
from mt_data.tokenizers.hugging_face import HuggingFaceTokenizer

TEXT = "ab<|x|> cd<|y|><|z|> <s>e"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


def listed(text: str, **flags: bool) -> dict[str, Any]:
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | flags


def load(directory: Path) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(directory)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def make_library_tokenizer(template: str | None = None) -> Tokenizer:
    """Letters, each a token, and `<s>` and `</s>`; `<|m|>` is in the vocabulary, but no added token."""
    tokens = ["<unk>", "<s>", "</s>", "<|m|>", *"▁abcdefghijklmnopqrstuvwxyz<>|"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    if template:
        special = [("<s>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=None, special_tokens=special)  # pyright: ignore
    return tokenizer


@pytest.fixture
def make_directory(tmp_path: Path) -> Callable[..., Path]:
    def make(template: str | None = None, **files: dict[str, Any]) -> Path:
        make_library_tokenizer(template).save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return make


DIRECTORIES: dict[str, dict[str, Any]] = {
    "list of added tokens": {
        "tokenizer_config": NAMED
        | {"added_tokens_decoder": {"35": listed("<|y|>", special=False), "34": listed("<|x|>", rstrip=True)}}
    },
    "added_tokens.json": {"tokenizer_config": NAMED, "added_tokens": {"<|x|>": 35, "<|y|>": 34}},
    "a list hides the older files": {
        "tokenizer_config": {"added_tokens_decoder": {"34": listed("<|z|>")}},
        "added_tokens": {"<|x|>": 35},
        "special_tokens_map": {"eos_token": "<|y|>"},
    },
    "extra tokens": {"tokenizer_config": NAMED | {"extra_special_tokens": ["<|y|>", "<|x|>"]}},
    "extra tokens by their older name": {"tokenizer_config": NAMED | {"additional_special_tokens": ["<|y|>", "<|x|>"]}},
    "extra tokens under both names": {
        "tokenizer_config": NAMED | {"extra_special_tokens": ["<|x|>"], "additional_special_tokens": ["<|y|>"]}
    },
    "extra tokens with names": {
        "tokenizer_config": NAMED
        | {
            "extra_special_tokens": {"image_token": "<|x|>"},
            "additional_special_tokens": ["<|z|>"],
            "audio_token": "<|y|>",
            "pad_token": "<p>",
        }
    },
    "every role": {"tokenizer_config": {f"{role}_token": f"<{role}>" for role in reversed(ROLES)}},
    "an end that nobody lists": {"tokenizer_config": NAMED | {"eos_token": "<|x|>", "pad_token": "<|y|>"}},
    "an end that is a plain word of the vocabulary": {"tokenizer_config": {"eos_token": "<|m|>"}},
    "special_tokens_map.json": {
        "tokenizer_config": NAMED,
        "special_tokens_map": {"eos_token": "<|x|>", "extra_special_tokens": ["<|y|>"], "pad_token": listed("<|z|>")},
    },
    "special_tokens_map.json alone": {"special_tokens_map": {"eos_token": "<|x|>"}},
    "a list and names": {
        "tokenizer_config": {
            "added_tokens_decoder": {"34": listed("<|z|>")},
            "eos_token": "<|x|>",
            "extra_special_tokens": ["<|y|>", "<|z|>"],
        }
    },
    "no names": {"tokenizer_config": {}},
}


@pytest.mark.parametrize("files", DIRECTORIES.values(), ids=DIRECTORIES)
def test_ids_and_roles_equal_transformers(make_directory: Callable[..., Path], tmp_path: Path, files: dict[str, Any]):
    files.setdefault("tokenizer_config", {}).setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    directory = make_directory(**files)
    ours, reference = load(directory), AutoTokenizer.from_pretrained(directory)
    for text in (TEXT, "<|m|>"):
        assert ours.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert ours.vocabulary() == reference.get_vocab()
    assert ours.vocab_size == len(reference)
    named = {role: number for role in ROLES if (number := getattr(reference, f"{role}_token_id")) is not None}
    assert {role: ours.special[role] for role in named if role != "unk"} == {
        role: number for role, number in named.items() if role != "unk"
    }
    assert getattr(ours, "eod", None) == reference.eos_token_id
    extra = reference.convert_tokens_to_ids(reference.extra_special_tokens)
    assert ours.additional_special_tokens_ids == tuple(extra)
    saved = tmp_path / "saved"
    ours.save(saved)
    again = AutoTokenizer.from_pretrained(saved)
    assert again(TEXT)["input_ids"] == ours.encode(TEXT) == load(saved).encode(TEXT)
    assert fingerprint(load(saved)) == fingerprint(ours)
    assert again.eos_token_id == reference.eos_token_id


def test_a_listed_id_that_the_vocabulary_has_no_place_for_is_refused(make_directory: Callable[..., Path]):
    directory = make_directory(tokenizer_config={"added_tokens_decoder": {"40": listed("<|x|>"), "3": listed("a")}})
    with pytest.raises(MtError) as error:
        load(directory)
    assert [problem.actual for problem in error.value.problems] == [
        "the files beside it give 'a' the id 3, here it gets 5",
        "the files beside it give '<|x|>' the id 40, here it gets 34",
    ]
    (directory / "tokenizer_config.json").write_text('{"added_tokens_decoder": ["<|x|>"]}')
    with pytest.raises(MtError, match="lists added tokens in an unknown form; an object of id and token"):
        load(directory)


@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_the_models_own_end_counts_where_none_is_named(make_directory: Callable[..., Path], name: str):
    assert load(make_directory(**{name: {"eos_token_id": [3, 1]}})).eod == 3


def test_an_end_of_document_is_never_guessed(make_directory: Callable[..., Path], tmp_path: Path):
    directory = make_directory()  # though its vocabulary has a </s>
    tokenizer = load(directory)
    hint = r'\.json: does not say which token ends a document; put \{"eos_token": "…"\} into .*/tokenizer_config'
    with pytest.raises(NoSuchToken, match=hint):
        tokenizer.eod  # noqa: B018
    tokenizer.save(tmp_path / "saved")
    assert getattr(load(tmp_path / "saved"), "eod", None) is None
    config = TokenizerConfig(type="HuggingFaceTokenizer", model=str(directory))
    (tmp_path / "d.jsonl").write_text('{"text": "ab"}\n')
    for append_eod in (True, False):
        encoding = EncodingOptions(config, ("text",), append_eod)
        job = PreprocessJob((tmp_path / "d.jsonl",), str(tmp_path / "out"), encoding=encoding)
        if append_eod:
            with pytest.raises(MtError, match=hint):
                preprocess(job)
            assert not list(tmp_path.glob("out*"))
        else:
            assert preprocess(job).documents == 1
    assert make_sample_options(GPTData(seq_length=4, tokenizer=config)).eod == -1
    with pytest.raises(MtError, match=hint):
        make_sample_options(GPTData(seq_length=4, tokenizer=config, eod_mask_loss=True))


@pytest.mark.parametrize("template", [None, "<s> $A", "<s> <s> $A </s>", "$A </s>"])
def test_what_the_post_processor_puts_before_a_text(make_directory: Callable[..., Path], template: str | None):
    directory = make_directory(template, tokenizer_config=NAMED | {"tokenizer_class": "PreTrainedTokenizerFast"})
    ours, reference = load(directory), AutoTokenizer.from_pretrained(directory)
    for text in ("ab", "", "<s>a"):
        ids = [*ours.prefix_ids, *ours.encode(text)]
        assert ids == reference(text)["input_ids"][: len(ids)]
    assert len(ours.prefix_ids) == (template or "").count("<s>")


def test_add_bos_token_puts_a_bos_where_the_post_processor_puts_nothing(make_directory: Callable[..., Path]):
    directory = make_directory(tokenizer_config=NAMED | {"add_bos_token": True})
    ours = load(directory)
    reference = PreTrainedTokenizerFast(tokenizer_object=make_library_tokenizer(), **NAMED, add_bos_token=True)
    assert [*ours.prefix_ids, *ours.encode("ab")] == reference("ab")["input_ids"] == [1, 5, 6]
    assert ours.encode("ab") == [5, 6]
    (directory / "tokenizer_config.json").write_text(json.dumps(NAMED | {"add_bos_token": False}))
    assert load(directory).prefix_ids == ()


def test_a_tokenizer_with_missing_tokens_goes_to_worker_processes(make_directory: Callable[..., Path]):
    import pickle

    tokenizer = load(make_directory("<s> $A", tokenizer_config=NAMED | {"pad_token": "<|x|>"}))
    other: HuggingFaceTokenizer = pickle.loads(pickle.dumps(tokenizer))
    assert other.encode(TEXT) == tokenizer.encode(TEXT)
    assert (other.eod, other.pad, other.prefix_ids) == (2, 34, (1,))


def test_a_type_that_adds_nothing_has_no_prefix():
    assert BytesTokenizer(TokenizerConfig(type="bytes")).prefix_ids == ()
