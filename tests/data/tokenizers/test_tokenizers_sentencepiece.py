"""The three SentencePiece types on models trained here: ids, special tokens, and what is wrong with a model."""

import io
import pickle
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from data.conftest import shared
from mt_core.contracts import Tokenizer
from mt_core.errors import MtError
from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer, fingerprint, load_tokenizer

FULL, GPT, LLAMA = "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"
TYPES = (FULL, GPT, LLAMA)


def train(path: Path, **options: Any) -> Path:
    """A model of 60 pieces on the alphabet in Shakespeare's spelling."""
    lines = shared("tinyshakespeare.txt").read_text("utf-8").lower().replace("\n", " ").split(".")[:800]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("sentencepiece")

    def model(name: str, **options: Any) -> Path:
        path = folder / f"{name}.model"
        return path if path.exists() else train(path, **options)

    return model


@pytest.fixture
def plain(models: Callable[..., Path]) -> Path:
    """The library's usual model: `<unk>` 0, `<s>` 1, `</s>` 2, no pad."""
    return models("plain")


@pytest.fixture
def padded(models: Callable[..., Path]) -> Path:
    return models("padded", pad_id=3, pad_piece="<pad>")


def open_as(type: str, model: Path, extra: int = 0) -> Any:
    return build_tokenizer(TokenizerConfig(type=type, model=str(model), vocab_extra_ids=extra))


def test_the_specifications_example_of_ids(plain: Path):
    tokenizer = open_as(FULL, plain, 2)
    roles = {"cls": 60, "sep": 61, "eod": 62, "mask": 63, "pad": 64, "bos": 1, "eos": 2}
    assert {role: getattr(tokenizer, role) for role in roles} == roles
    assert tokenizer.additional_special_tokens_ids == (65, 66)
    assert tokenizer.vocab_size == 67
    texts = [tokenizer.token_text(number) for number in (*range(60, 67), 1, 2)]
    assert texts == ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<extra_id_0>", "<extra_id_1>", "<s>", "</s>"]


def test_the_specifications_example_with_a_pad_of_the_models_own(padded: Path):
    tokenizer = open_as(FULL, padded, 2)
    assert (tokenizer.pad, tokenizer.additional_special_tokens_ids, tokenizer.vocab_size) == (3, (64, 65), 66)


def test_pieces_that_the_model_has_keep_their_ids(models: Callable[..., Path]):
    model = models("own", user_defined_symbols=["<MASK>", "<extra_id_0>"], bos_id=-1)
    tokenizer = open_as(FULL, model, 2)
    own = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert tokenizer.mask == own.piece_to_id("<MASK>") < 60
    assert tokenizer.additional_special_tokens_ids == (own.piece_to_id("<extra_id_0>"), 65)
    assert (tokenizer.bos, tokenizer.token_text(64)) == (64, "<BOS>")


def test_special_tokens_in_a_text_are_found_and_the_rest_encoded_for_itself(plain: Path):
    tokenizer = open_as(FULL, plain, 2)
    own = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    expected = [*own.encode("to be"), 63, *own.encode("or "), 1, *own.encode(" not"), 66, 65]
    assert tokenizer.encode("to be<MASK>or <s> not<extra_id_1><extra_id_0>") == expected
    assert tokenizer.encode("<EOD>") == [62]
    assert tokenizer.encode("") == []


def test_of_two_special_tokens_at_one_place_the_first_added_wins(models: Callable[..., Path]):
    model = models("prefix", pad_id=3, pad_piece="<MASK", control_symbols=["<MASK>"])
    tokenizer = open_as(FULL, model)
    assert tokenizer.encode("<MASK>") == [tokenizer.mask]
    assert tokenizer.encode("<MASK")[:1] == [tokenizer.pad]


def test_decoding_sets_special_tokens_apart(plain: Path):
    tokenizer = open_as(FULL, plain, 2)
    assert tokenizer.decode(tokenizer.encode("to be<MASK>or not")) == "to be <MASK> or not"
    assert tokenizer.decode(tokenizer.encode("to<s><extra_id_0>be")) == "to <s>  <extra_id_0> be"
    assert tokenizer.decode([]) == ""


def test_the_plain_types_have_the_models_ids_only(plain: Path, padded: Path):
    own = sentencepiece.SentencePieceProcessor(model_file=str(plain))
    text = "to be, or not to be <s> </s>"
    gpt, llama = open_as(GPT, plain), open_as(LLAMA, plain)
    assert gpt.encode(text) == own.encode(text)
    assert llama.encode(text) == [1, *own.encode(text)]
    for tokenizer in (gpt, llama):
        assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.eos, tokenizer.bos) == (60, 2, 2, 1)
        assert tokenizer.decode(tokenizer.encode("to be, or not")) == "to be, or not"
        assert getattr(tokenizer, "pad", -1) == -1
        with pytest.raises(
            MtError, match=f"{tokenizer.type}: has no mask token; choose another tokenizer: .* bos, eos"
        ):
            tokenizer.mask  # noqa: B018
    assert open_as(GPT, padded).pad == 3
    assert llama.encode("") == [1]


@pytest.mark.parametrize("type", TYPES)
def test_batches_have_the_ids_of_single_texts(plain: Path, texts: list[str], type: str):
    tokenizer = open_as(type, plain)
    sample = [*texts, "a<s>b</s><MASK>", "日本 é"]
    assert tokenizer.encode_batch(sample) == [tokenizer.encode(text) for text in sample]
    assert tokenizer.encode_batch([]) == []
    assert isinstance(tokenizer, Tokenizer)


OFFSET_SAMPLES = (
    "",
    "dog",
    "  the  walking dog\n\n",
    "x<s>y</s> <MASK>z",
    "Größe ﬁ 😀\u3000Ａ",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.mark.parametrize("type", ["GPTSentencePieceTokenizer", "Llama2Tokenizer", "SentencePieceTokenizer"])
def test_offsets_tile_the_text_and_belong_to_the_ids_of_encode(plain: Path, texts: list[str], type: str):
    tokenizer = open_as(type, plain)
    for text in (*OFFSET_SAMPLES, *texts):
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert offsets == sorted(offsets)
        assert "".join("".join(text[begin:end] for begin, end in offsets).split()) == "".join(text.split())
        for number, (begin, end) in zip(ids, offsets, strict=True):
            if begin < end and text[begin:end].isascii() and number != tokenizer.processor.unk_id():
                assert tokenizer.decode([number]).strip() == text[begin:end].strip()


def encode_elsewhere(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer.encode_batch(texts)


@pytest.mark.parametrize("type", TYPES)
def test_saved_pickled_and_in_a_worker_it_stays_the_same(plain: Path, tmp_path: Path, type: str):
    tokenizer = open_as(type, plain, 3 if type == FULL else 0)
    tokenizer.save(tmp_path)
    sample = ["to be<MASK>or", "not <extra_id_2>"]
    expected = tokenizer.encode_batch(sample)
    for other in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode_batch(sample) == expected
        assert fingerprint(other) == fingerprint(tokenizer)
        assert other.type == type
    assert (tmp_path / "tokenizer.model").read_bytes() == plain.read_bytes()


def test_a_worker_process_encodes_the_same(plain: Path):
    tokenizer = open_as(FULL, plain)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(encode_elsewhere, tokenizer, ["to be<MASK>"]).result() == tokenizer.encode_batch(
            ["to be<MASK>"]
        )


def test_ids_equal_megatrons(plain: Path, padded: Path, texts: list[str]):
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

    for model in (plain, padded):
        reference = SentencePieceTokenizer(str(model))
        ours = open_as(GPT, model)
        assert [ours.encode(text) for text in texts[:100]] == [reference.text_to_ids(text) for text in texts[:100]]
        assert (ours.eod, ours.bos, getattr(ours, "pad", -1)) == (reference.eos_id, reference.bos_id, reference.pad_id)


def test_special_ids_equal_megatrons(plain: Path):
    pytest.importorskip("megatron.core")
    from megatron.core.tokenizers.text.libraries.sentencepiece_tokenizer import SentencePieceTokenizer

    ours = open_as(FULL, plain, 2)
    added = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>", "<s>", "</s>", "<extra_id_0>", "<extra_id_1>"]
    reference = SentencePieceTokenizer(
        str(plain), special_tokens=added, legacy=True, trim_spm_separator_after_special_token=False
    )
    assert [reference.token_to_id(token) for token in added] == [ours.vocabulary()[token] for token in added]
    for text in ("to be<MASK>or <s> not<extra_id_1><extra_id_0>", "<EOD>", "the end</s>", "a  b <CLS>  c"):
        assert ours.encode(text) == reference.text_to_ids(text)
        assert ours.decode(ours.encode(text)).split() == reference.ids_to_text(reference.text_to_ids(text)).split()


@pytest.mark.parametrize("type", TYPES)
def test_a_wrong_model(tmp_path: Path, type: str):
    with pytest.raises(MtError, match=f"{type}: needs model; give --tokenizer-model: a SentencePiece .model file"):
        build_tokenizer(TokenizerConfig(type=type))
    with pytest.raises(MtError, match=r"tokenizer\.model: does not exist; a SentencePiece \.model file"):
        open_as(type, tmp_path)
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(MtError, match=r"x\.model: is not a SentencePiece model"):
        open_as(type, tmp_path / "x.model")


def test_a_model_without_ends(models: Callable[..., Path]):
    with pytest.raises(MtError, match="has no end-of-sequence piece, which would end documents"):
        open_as(GPT, models("endless", eos_id=-1))
    with pytest.raises(MtError, match="has no beginning-of-sequence piece; use GPTSentencePieceTokenizer"):
        open_as(LLAMA, models("headless", bos_id=-1))


@pytest.mark.parametrize("type", TYPES)
def test_without_the_library(plain: Path, monkeypatch: pytest.MonkeyPatch, type: str):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        MtError, match=rf"{type}: needs 'sentencepiece', which is not installed; .*'mt-data\[sentencepiece\]'"
    ):
        open_as(type, plain)
