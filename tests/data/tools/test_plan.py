"""`mt data blend` and `mt data plan`: what a run will draw, before it begins."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mt_core.config.loading import load
from mt_core.errors import MtError
from mt_core.plugins import component
from mt_data.config import GPTData
from mt_data.config.paths import parse_paths
from mt_data.datasets.gpt.dataset import build_splits
from mt_data.datasets.mock import MockSequences
from mt_data.tools.epoch_plan import StreamSampling, make_sources, plan_sources
from mt_data.tools.plan import data_plan_config_type, plan_run
from word_pieces import toy_corpus, toy_tokenizer

Corpus = Callable[[str, Sequence[int]], str]
CUT = StreamSampling(seq_length=4)


def mt(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mt_cli", "data", *args], capture_output=True, text=True)


def drawn(paths: list[str], tokens: list[int], samples: int) -> list[tuple[str, int, float]]:
    plans = plan_sources(make_sources(parse_paths(paths), tokens), samples, CUT)
    return [(row.source.prefix, row.samples, round(row.epochs, 4)) for row in plans]


def test_weights_share_the_samples_and_repeat_the_data():
    assert drawn(["3", "a", "1", "b"], [101, 41], 100) == [("a", 75, 2.9703), ("b", 25, 2.439)]


def test_one_source_gives_every_sample():
    assert drawn(["a"], [101], 50) == [("a", 50, 1.9802)]


def test_without_weights_each_gives_in_proportion_to_its_size_and_at_most_once():
    assert drawn(["a", "b", "c"], [81, 41, 41], 40) == [("a", 20, 0.9877), ("b", 10, 0.9756), ("c", 10, 0.9756)]
    with pytest.raises(MtError, match="data.paths: hold 40 samples in one epoch, the run wants 41; give each path a w"):
        drawn(["a", "b", "c"], [81, 41, 41], 41)


def test_a_source_without_tokens():
    with pytest.raises(MtError, match="b: has no tokens to draw from; leave it out, or give its split a larger share"):
        drawn(["1", "a", "1", "b"], [9, 0], 3)


@pytest.mark.parametrize("weights", [(0.3, 0.7), (5, 1), None])
def test_the_run_draws_what_is_foretold(corpus: Corpus, tmp_path: Path, weights: tuple[float, float] | None):
    prefixes = (corpus("a", (40, 31, 50)), corpus("b", (20, 31)))
    paths = (
        [*prefixes]
        if weights is None
        else [part for w, p in zip(weights, prefixes, strict=True) for part in (str(w), p)]
    )
    config = GPTData(paths=tuple(paths), split="1", seq_length=4)
    train = build_splits(config, samples=(40, 0, 0), seed=1, cache_dir=tmp_path / "cache").train
    assert train is not None
    taken = Counter(int(train[i]["dataset_id"]) for i in range(40))
    assert [samples for _, samples, _ in drawn(paths, [121, 51], 40)] == [taken[0], taken[1]]


def test_blend_prints_and_writes_a_file_that_it_reads_again(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (40, 31, 50)), corpus("b", (20, 31))
    options = ["--samples", "60", "--seq-length", "4"]
    ran = mt("blend", "--data-path", "0.75", a, "0.25", b, *options, "--output", tmp_path / "blend.txt")
    assert (ran.returncode, ran.stderr) == (0, "")
    header, first, second, *_ = (line.split() for line in ran.stdout.splitlines())
    assert header == ["source", "share", "tokens", "samples", "epochs"]
    assert first == [a, "75.00%", "121", "45", "1.488"]
    assert second == [b, "25.00%", "51", "15", "1.176"]
    assert (tmp_path / "blend.txt").read_text() == f"0.75 {a}\n0.25 {b}\n"
    again = mt("blend", "--data-args-path", tmp_path / "blend.txt", *options)
    assert again.stdout.splitlines() == ran.stdout.splitlines()[:3]


def test_blend_writes_sizes_where_no_weights_are_given(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (40, 31, 50)), corpus("b", (20, 31))
    mt("blend", "--data-path", a, b, "--samples", "9", "--seq-length", "4", "--output", tmp_path / "blend.txt")
    assert (tmp_path / "blend.txt").read_text() == f"30 {a}\n12 {b}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--data-path: either it or --data-args-path is needed, and not both"),
        (["--data-args-path", "gone.txt"], "gone.txt: no such file; a file of prefixes"),
        (["--data-path", "1", "nowhere"], "nowhere: no file nowhere.bin and nowhere.idx"),
        (["--data-path", "0", "a"], "data.paths: weight 0.0; weights are finite and greater than 0"),
    ],
)
def test_blends_that_are_none(words: list[str], message: str):
    ran = mt("blend", *words, "--samples", "9", "--seq-length", "4")
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"mt: {message}")


@pytest.fixture
def run_toml(corpus: Corpus, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    a, b = corpus("a", (40, 31, 50, 9)), corpus("b", (20, 31, 22, 8))
    path.write_text(f"""
        model = {{ kind = "nothing that is installed" }}
        data = {{ paths = ["3", "{a}", "1", "{b}"], split = "75,25,0", seq_length = 4 }}
        batch = {{ global_batch = 6 }}
        train = {{ steps = 10, eval_every = 5, eval_batches = 2 }}
    """)
    return path


def test_the_plan_of_a_run_needs_no_model(run_toml: Path):
    ran = mt("plan", run_toml)
    assert (ran.returncode, ran.stderr) == (0, "")
    rows = [line.split() for line in ran.stdout.splitlines()]
    assert rows[0] == ["split", "source", "share", "tokens", "samples", "epochs"]
    assert [[row[0], *row[2:]] for row in rows[1:5]] == [
        ["train", "75.00%", "121", "45", "1.488"],
        ["train", "25.00%", "73", "15", "0.822"],
        ["valid", "75.00%", "9", "9", "4.000"],
        ["valid", "25.00%", "8", "3", "1.500"],
    ]
    assert ran.stdout.splitlines()[-2:] == [
        "step  6 samples × 4 tokens = 24 tokens",
        "run   10 steps, 60 samples, 240 tokens",
    ]


def test_a_plan_of_options_alone(corpus: Corpus):
    a = corpus("a", (40, 31, 50))
    planned = plan_run((), [f'data.train_paths=["{a}"]', "data.seq_length=4", "train.steps=60"])
    assert [(split.name, split.sources[0].samples) for split in planned.splits] == [("train", 60)]
    assert planned.splits[0].sources[0].epochs == pytest.approx(240 / 121, rel=1e-12)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.split=1,0,0", "the valid split of .*a: is empty: 4 sequences, split '1,0,0'; a larger share for valid"),
        ("data.kind=mock", "data.tokenizer: is not given; mock data needs one"),
        ("data.paths=[]", "data: names nothing for train; give it in data.paths or one of the other forms"),
        ("train.step=9", "train.step: unknown key; did you mean 'steps'"),
        ('data.paths=["gone"]', "data.paths: no file gone.bin and gone.idx"),
    ],
)
def test_runs_that_have_no_plan(run_toml: Path, override: str, message: str):
    extra = ["data.seq_length=4"] if override == "data.kind=mock" else []
    with pytest.raises(MtError, match=message):
        plan_run([run_toml], [override, *extra])


def planned(
    data: str, steps: int = 3, batch: int = 4, evaluate: int = 0
) -> list[tuple[str, str, int | None, int, float]]:
    """Split, source, tokens, samples and epochs of every row."""
    sets = [f"data={data}", f"train.steps={steps}", f"batch.global_batch={batch}", f"train.eval_every={evaluate}"]
    return [
        (split.name, row.source.prefix, row.source.tokens, row.samples, row.epochs)
        for split in plan_run((), [*sets, "train.eval_batches=1"]).splits
        for row in split.sources
    ]


@pytest.fixture
def toy(tmp_path: Path) -> tuple[str, str]:
    """Three documents of 8 sentences, and their tokenizer as TOML."""
    tokenizer = toy_tokenizer(tmp_path)
    fields = f'type="{tokenizer.type}", vocab_file="{tokenizer.vocab_file}", vocab_extra_ids=10'
    return toy_corpus(tmp_path), f"tokenizer={{{fields}}}, seq_length=24"


@pytest.mark.parametrize("kind", ["bert", "t5", "ict"])
def test_the_samples_of_sentences_are_those_that_the_run_gathers(kind: str, toy: tuple[str, str], tmp_path: Path):
    corpus, rest = toy
    ((split, source, tokens, samples, epochs),) = planned(f'{{kind="{kind}", paths=["{corpus}"], split="1", {rest}}}')
    config = load(
        data_plan_config_type(), (), [f'data={{kind="{kind}", paths=["{corpus}"], split="1", {rest}}}'], rules=False
    ).data
    build = component("dataset", kind)
    one_epoch = len(build(config, samples=(None, 0, 0), seed=1234, cache_dir=tmp_path / "cache").train)
    assert (split, source, tokens, samples) == ("train", corpus, 32, 12)
    assert epochs == 12 / one_epoch


def test_conversations_are_a_sample_a_line(tmp_path: Path):
    path = tmp_path / "chat.jsonl"
    path.write_text('{"messages": []}\n' * 8)
    data = f'{{kind="sft", paths=["{path}"], split="3,1,0", seq_length=8, tokenizer={{type="bytes"}}}}'
    assert planned(data, evaluate=2) == [("train", str(path), None, 12, 2.0), ("valid", str(path), None, 4, 2.0)]
    ran = mt("plan", "--set", f"data={data}", "--set", "train.steps=3")
    assert ran.stdout.splitlines()[1].split() == ["train", str(path), "100.00%", "unknown", "3", "0.500"]


def test_the_mock_corpus_has_a_third_for_each_split():
    ((_, source, tokens, samples, epochs),) = planned('{kind="mock", seq_length=4, tokenizer={type="bytes"}}')
    lengths = MockSequences(eod=0, vocab_size=9).lengths[:33_333]
    assert (source, tokens, samples) == ("mock", lengths.sum(), 12)
    assert epochs == 48 / lengths.sum()


def test_every_form_of_paths(corpus: Corpus, tmp_path: Path):
    a, b = corpus("a", (40, 31, 50)), corpus("b", (20, 31))
    (tmp_path / "blend.txt").write_text(f"3 {a}\n1 {b}\n")
    (tmp_path / "splits.json").write_text(json.dumps({"train": [a], "valid": ["1", b], "test": None}))
    whole = [("train", a, 121, 12, 48 / 121), ("valid", b, 51, 4, 16 / 51)]
    assert planned(f'{{train_paths=["{a}"], valid_paths=["{b}"], seq_length=4}}', evaluate=1) == whole
    assert planned(f'{{split_paths_file="{tmp_path}/splits.json", seq_length=4}}', evaluate=1) == whole
    weighted = [("train", a, 121, 9, 36 / 121), ("train", b, 51, 3, 12 / 51)]
    assert planned(f'{{paths_file="{tmp_path}/blend.txt", split="1", seq_length=4}}') == weighted
    with pytest.raises(MtError, match="data: names nothing for valid; give it in data.paths or one of the other forms"):
        planned(f'{{train_paths=["{a}"], seq_length=4}}', evaluate=1)


def test_a_source_without_samples(toy: tuple[str, str]):
    corpus, rest = toy
    with pytest.raises(MtError, match="toy: has no samples to draw from; leave it out, or give its split a larger"):
        planned(f'{{kind="bert", paths=["{corpus}"], split="1,1,1", {rest}}}', evaluate=1)
    with pytest.raises(MtError, match="the valid split of .*toy: is empty: 3 documents, split '1'; a larger share for"):
        planned(f'{{kind="t5", paths=["{corpus}"], split="1", {rest}}}', evaluate=1)
