"""A step of the corpus pipeline: resumed at the item, done once, strict about bad lines; and ids for its records."""

from pathlib import Path

import pytest

from data.corpus.conftest import read_records, write_records
from mt_core.errors import MtError
from mt_data.corpus import step as step_module
from mt_data.corpus.clean import CleaningRules, clean
from mt_data.corpus.records import add_ids
from mt_data.corpus.step import CorpusStep, StepOutput, run_step


def counting(seen: list[int], stop_at: int | None = None):
    def produce(item: int) -> StepOutput:
        if item == stop_at:
            raise MtError("item", "is bad")
        seen.append(item)
        produced = StepOutput(f"{item}\n".encode())
        produced.counts["items"] = 1
        return produced

    return produce


def test_a_step_goes_on_where_it_was_stopped(tmp_path: Path):
    step, seen = CorpusStep("count", tmp_path / "out", ()), []
    with pytest.raises(MtError, match="item: is bad"):
        run_step(step, range(10), counting(seen, stop_at=6))
    assert not step.output.exists()
    assert run_step(step, range(10), counting(seen)) == {"items": 10}
    assert seen == list(range(10))
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(10))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.report.json"}


def test_an_interrupt_inside_an_item_neither_loses_nor_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, after = CorpusStep("count", tmp_path / "out", ()), step_module._add_output

    def interrupted(state: step_module.StepState, result: StepOutput, size: int) -> step_module.StepState:
        if state.items == 3:  # its data is written, but not yet counted
            raise KeyboardInterrupt
        return after(state, result, size)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "_add_output", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_step(step, range(9), counting([]))
    assert run_step(step, range(9), counting([])) == {"items": 9}
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(9))


@pytest.mark.parametrize("killed_at", range(6))
def test_what_a_kill_leaves_behind_the_journal_is_written_again(
    tmp_path: Path, killed_at: int, monkeypatch: pytest.MonkeyPatch
):
    """The part is longer than the journal says, as when the process dies between the two."""
    monkeypatch.setattr(step_module, "JOURNAL_INTERVAL_S", 0.0)
    step = CorpusStep("count", tmp_path / "out", ())
    with pytest.raises(MtError):
        run_step(step, range(9), counting([], stop_at=killed_at))
    with step.part.open("ab") as part:
        part.write(b"torn li")
    run_step(step, range(9), counting([]))
    assert step.output.read_text() == "".join(f"{i}\n" for i in range(9))


def test_a_finished_step_is_not_run_again_unless_its_input_or_options_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, seen = tmp_path / "in", []
    source.write_text("a")
    run_step(CorpusStep("count", tmp_path / "out", (source,)), range(2), counting(seen))
    assert run_step(CorpusStep("count", tmp_path / "out", (source,)), range(2), counting(seen)) == {"items": 2}
    assert f"count: {tmp_path}/out is already made from these inputs" in capsys.readouterr().err
    assert len(seen) == 2
    run_step(CorpusStep("count", tmp_path / "out", (source,), {"seed": 2}), range(2), counting(seen))
    source.write_text("ab")
    run_step(CorpusStep("count", tmp_path / "out", (source,), {"seed": 2}), range(2), counting(seen))
    assert len(seen) == 6


def test_the_journal_of_another_input_is_not_used(tmp_path: Path):
    source, seen = tmp_path / "in", []
    source.write_text("a")
    with pytest.raises(MtError):
        run_step(CorpusStep("count", tmp_path / "out", (source,)), range(5), counting(seen, stop_at=3))
    source.write_text("ab")
    run_step(CorpusStep("count", tmp_path / "out", (source,)), range(5), counting(seen))
    assert seen == [0, 1, 2, 0, 1, 2, 3, 4]


def test_a_bad_line_stops_a_step_or_is_counted(tmp_path: Path):
    source = write_records(tmp_path / "in.jsonl", {"text": "a"}, {"txt": "b"}, {"text": "c"})
    with pytest.raises(MtError, match=r"in.jsonl:2: has no key 'text', only 'txt'; one JSON object a line; --on-error"):
        clean([source], tmp_path / "out", CleaningRules(language="any", min_tokens=0))
    counts = clean([source], tmp_path / "out", CleaningRules(language="any", min_tokens=0), on_error="skip")
    assert counts == {"records": 3, "kept": 2, "bad lines": 1, "written": 2}
    with pytest.raises(MtError, match=r"inn.jsonl: no such file; did you mean .*in.jsonl\?"):
        clean([tmp_path / "inn.jsonl"], tmp_path / "out", CleaningRules())


def test_each_record_gets_an_id(tmp_path: Path):
    inputs = [write_records(tmp_path / name, {"text": name}, {"text": name}) for name in "ab"]
    add_ids(inputs, tmp_path / "out", "web")
    assert [record["adlr_id"] for record in read_records(tmp_path / "out")] == [
        f"web-000000000{n}" for n in (1, 2, 3, 4)
    ]
