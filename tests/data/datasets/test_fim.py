"""Fill in the middle (docs/specs/data.md §5.8) on real text."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mt_core.contracts import Dataset
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.config import FIMData
from mt_data.datasets.fim import FIMDataset
from mt_data.indexed.writer import IndexedWriter

PRE, MID, SUF, PAD, EOD, CUT = range(256, 262)
TEXTS = ["the quick brown fox", "jumps over", "", "the lazy dog and then some more of it", "short"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> dict[str, str]:
    """Bytes, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    model.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    names = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|endoftext|>", "<cut>")
    model.add_special_tokens([AddedToken(name) for name in names])
    model.save(str(tmp_path / "tokenizer.json"))
    return {"type": "HuggingFaceTokenizer", "model": str(tmp_path)}


def train(
    tmp_path: Path, tokenizer: dict[str, str], text: str = "", seq_length: int = 100, **options: object
) -> Dataset:
    """One sequence of all texts, each with its end of document."""
    model = Tokenizer.from_file(f"{tokenizer['model']}/tokenizer.json")
    tokens = model.encode(text or "".join(text + "<|endoftext|>" for text in TEXTS)).ids
    with IndexedWriter(tmp_path / "c", np.dtype("uint16")) as writer:
        writer.add_documents(np.array(tokens), np.array([len(tokens)]))
    values = {"paths": [str(tmp_path / "c")], "split": "1", "seq_length": seq_length, "tokenizer": tokenizer}
    config = FIMData.model_validate({**values, **options})
    dataset = component("dataset", "fim")(config, samples=(3, 0, 0), seed=3, cache_dir=tmp_path / "cache").train
    assert dataset is not None
    return dataset


def parts(tokens: list[int]) -> list[str]:
    """The texts between the tokens PRE, SUF and MID, in the order of the document."""
    assert tokens[0] == PRE
    model = {n: c for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    spell = decoders.ByteLevel()

    def text(ids: list[int]) -> str:
        return spell.decode([model[i] for i in ids])

    middle = tokens.index(MID)
    if tokens[1] == SUF:  # suffix first, and prefix and middle are one text
        return [text(tokens[middle + 1 :]), text(tokens[2:middle])]
    suffix = tokens.index(SUF)
    return [text(tokens[1:suffix]), text(tokens[middle + 1 :]), text(tokens[suffix + 1 : middle])]


@pytest.mark.parametrize("spm", [0, 1])
def test_the_parts_of_a_document_are_its_text(tmp_path: Path, tokenizer: dict[str, str], spm: int):
    dataset = train(tmp_path, tokenizer, seq_length=30, rate=1, spm_rate=spm)
    assert isinstance(dataset, FIMDataset)
    document = dataset.transform.tokenizer.encode(TEXTS[3])
    cuts = set()
    for seed in range(20):
        tokens = dataset.transform.transform_document(document, np.random.RandomState(seed))
        assert not spm or tokens[:2] == [PRE, SUF]
        assert "".join(parts(tokens)) == TEXTS[3]
        cuts.add(tuple(tokens))
    assert len(cuts) > 10


def test_documents_of_a_sample_are_rearranged_between_their_ends(tmp_path: Path, tokenizer: dict[str, str]):
    text = "".join(text + "<|endoftext|>" for text in TEXTS[:2])
    dataset = train(tmp_path, tokenizer, text, seq_length=25, rate=1)
    tokens = dataset[0]["tokens"].tolist()
    end = tokens.index(EOD)
    assert "".join(parts(tokens[:end])) == TEXTS[0]
    assert tokens[end + 1] == PRE


def test_samples_keep_their_length(tmp_path: Path, tokenizer: dict[str, str]):
    dataset = train(tmp_path, tokenizer, seq_length=30)
    for i in range(len(dataset)):
        item = dataset[i]
        assert item["tokens"].shape == item["labels"].shape == (30,)
        assert np.array_equal(item["tokens"][1:], item["labels"][:-1])


def test_at_rate_0_only_the_ends_of_empty_documents_go(tmp_path: Path, tokenizer: dict[str, str]):
    texts = "a<|endoftext|><|endoftext|>b<|endoftext|>cdef"
    sample = train(tmp_path, tokenizer, texts, seq_length=8, rate=0)[0]
    tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
    assert tokens.count(EOD) == 2
    assert labels.count(PAD) == 1  # in place of the end that went
    assert sample["loss_mask"].tolist() == [float(label != PAD) for label in labels]


def test_a_sample_does_not_depend_on_those_read_before(tmp_path: Path, tokenizer: dict[str, str]):
    first = train(tmp_path, tokenizer, seq_length=20)
    again = [first[2]["tokens"].tolist(), first[0]["tokens"].tolist()]
    other = train(tmp_path, tokenizer, seq_length=20)
    assert again == [other[2]["tokens"].tolist(), other[0]["tokens"].tolist()]


def test_a_plan_that_grows_keeps_its_samples(tmp_path: Path, tokenizer: dict[str, str]):
    before = train(tmp_path, tokenizer, seq_length=8)
    options = {"paths": [str(tmp_path / "c")], "split": "1", "seq_length": 8, "tokenizer": tokenizer}
    build = component("dataset", "fim")
    grown = build(FIMData.model_validate(options), samples=((3, 40), 0, 0), seed=3, cache_dir=tmp_path / "cache").train
    assert len(grown) >= 40 > len(before)
    assert [grown[i]["tokens"].tolist() for i in range(len(before))] == [
        s["tokens"].tolist() for s in map(before.__getitem__, range(len(before)))
    ]


def test_documents_that_begin_with_a_text_are_left_alone(tmp_path: Path, tokenizer: dict[str, str]):
    tokens = train(tmp_path, tokenizer, "the dog barks", seq_length=12, rate=1, no_prefix="the")[0]["tokens"]
    assert PRE not in tokens


def test_fragments_between_split_tokens_are_rearranged_one_by_one(tmp_path: Path, tokenizer: dict[str, str]):
    text = "one two<cut>three four<cut>five"
    options = {"rate": 1, "fragment_rate": 1, "split_token": "<cut>", "spm_rate": 0}
    item = train(tmp_path, tokenizer, text, seq_length=len("one twothree fourfive") + 1, **options)[0]
    tokens = item["tokens"].tolist()
    assert "".join(parts(tokens[: tokens.index(CUT)])) == "one two"


def test_a_token_that_the_tokenizer_lacks(tmp_path: Path, tokenizer: dict[str, str]):
    with pytest.raises(MtError, match=r"data\.middle_token: '<MID>' is not in the tokenizer's vocabulary"):
        train(tmp_path, tokenizer, middle_token="<MID>")
