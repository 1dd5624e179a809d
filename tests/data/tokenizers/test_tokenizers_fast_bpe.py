"""tiktoken stands in for GPT-2's tokenizer only where its ids are the same, and there it is faster."""

import re
import sysconfig
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from mt_data.config import TokenizerConfig
from mt_data.tokenizers import build_tokenizer
from mt_data.tokenizers.fast_bpe import LONG_SPACE, choose_encode, is_equivalent
from mt_data.tokenizers.gpt2_bpe import read_merges, read_vocabulary
from mt_data.tokenizers.train import train_tokenizer

pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Three megabytes of the standard library, tests of Unicode among them."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ["*.py", "email/*.py", "test/test_unicode*.py", "test/test_str*.py", "idlelib/*.txt", "idlelib/*.html"]
    paths = sorted(path for name in names for path in library.glob(name))
    return [path.read_text("utf-8", errors="replace") for path in paths][:300]


@pytest.mark.slow
def test_ids_are_the_same_on_real_text_and_come_faster(gpt2: TokenizerConfig, sources: list[str]):
    tokenizer = build_tokenizer(gpt2)
    fast = choose_encode(tokenizer, gpt2)
    assert fast != tokenizer.encode_batch
    fast(sources[:1])
    start = time.process_time()
    ids = fast(sources)
    middle = time.process_time()
    assert ids == tokenizer.encode_batch(sources)
    assert middle - start < time.process_time() - middle


def test_ids_are_the_same_for_every_character(gpt2: TokenizerConfig):
    """Both split with their own tables of letters, numbers and white space."""
    tokenizer = build_tokenizer(gpt2)
    characters = [chr(code) for code in range(0x3100)] + [chr(code) for code in range(0x3100, 0x110000, 61)]
    texts = [f"a{c}1 {c}{c}!" for c in characters if not "\ud800" <= c <= "\udfff"]
    assert choose_encode(tokenizer, gpt2)(texts) == tokenizer.encode_batch(texts)


@pytest.mark.slow
@pytest.mark.parametrize("space", [" ", "\n", " \n\t", "\t"])
def test_long_white_space_is_no_trouble(gpt2: TokenizerConfig, space: str):
    tokenizer = build_tokenizer(gpt2)
    texts = ["x" + space * (LONG_SPACE + 1) + "x", "x" + space * (LONG_SPACE - 1), "after"]
    assert choose_encode(tokenizer, gpt2)(texts) == tokenizer.encode_batch(texts)


def best_seconds(encode: Callable[[str], object], text: str) -> float:
    """Processor time of the fastest of five."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        encode(text)
        seconds.append(time.process_time() - start)
    return min(seconds)


def test_a_long_run_of_one_letter_costs_in_proportion_to_its_length(gpt2: TokenizerConfig):
    tokenizer = build_tokenizer(gpt2)
    fast = choose_encode(tokenizer, gpt2)
    for encode in (lambda text: fast([text]), tokenizer.encode):
        encode("a")
        growth = best_seconds(encode, "a" * 160_000) / best_seconds(encode, "a" * 20_000)
        assert growth < 8**1.5, "8 times the length: 8 if linear, 64 if quadratic"


def test_the_lowest_tiktoken_allowed_is_a_linear_one():
    """0.12 needs 4.4 s for 100,000 equal letters and 14.7 s for 200,000; 0.13 needs 0.016 s and 0.036 s."""
    project = tomllib.loads((Path(__file__).parents[3] / "packages/mt-data/pyproject.toml").read_text("utf-8"))
    (requirement,) = project["project"]["optional-dependencies"]["tiktoken"]
    floor = re.fullmatch(r"tiktoken>=(\d+)\.(\d+)", requirement)
    assert floor
    assert (int(floor[1]), int(floor[2])) >= (0, 13)


@pytest.mark.slow
def test_a_trained_tokenizer_is_fast_too(tmp_path: Path, sources: list[str]):
    (tmp_path / "text.txt").write_text("\n".join(sources[:40]), "utf-8")
    train_tokenizer([tmp_path / "text.txt"], tmp_path / "t", vocab_size=3000)
    config = TokenizerConfig(vocab_file=str(tmp_path / "t/vocab.json"), merge_file=str(tmp_path / "t/merges.txt"))
    tokenizer = build_tokenizer(config)
    assert choose_encode(tokenizer, config) != tokenizer.encode_batch
    assert choose_encode(tokenizer, config)(sources) == tokenizer.encode_batch(sources)


def test_merges_that_tiktoken_would_take_differently_are_found(gpt2: TokenizerConfig):
    assert gpt2.vocab_file
    assert gpt2.merge_file
    vocabulary, merges = read_vocabulary(Path(gpt2.vocab_file)), read_merges(Path(gpt2.merge_file))
    assert is_equivalent(vocabulary, merges)
    assert not is_equivalent(vocabulary, merges[:-1]), "a token that no merge makes"
    assert not is_equivalent(vocabulary, [merges[1], merges[0], *merges[2:]]), "ids that do not rise with the merges"
    alphabet = {token: number for token, number in vocabulary.items() if len(token) == 1}
    tokens = ("bc", "ab", "abc", "<|endoftext|>")
    small = alphabet | {token: 300 + at for at, token in enumerate(tokens)}
    good, bad = [("b", "c"), ("a", "b"), ("a", "bc")], [("b", "c"), ("a", "b"), ("ab", "c")]
    assert is_equivalent(small, good)
    assert not is_equivalent(small, bad), "abc becomes a and bc, which tiktoken would join"


def test_other_tokenizers_keep_their_own():
    config = TokenizerConfig(type="bytes")
    tokenizer = build_tokenizer(config)
    assert choose_encode(tokenizer, config) == tokenizer.encode_batch
