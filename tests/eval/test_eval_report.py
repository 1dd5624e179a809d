import math
import os
import pty
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mt_core.errors import MtError
from mt_eval.report import Report, publish

REPORT = Report(
    task="lambada",
    model="run",
    data="d.jsonl",
    metrics={"strict_accuracy": 0.4567891, "strict_accuracy_stderr": 0.0069393},
    counts={"passages": 5153},
    settings={"dtype": "fp32"},
    seconds=12.34,
)


def test_lines_are_aligned_where_there_is_no_terminal(capsys):
    publish(REPORT)
    assert capsys.readouterr().out == (
        "lambada\n"
        "model            run\n"
        "data             d.jsonl\n"
        "strict accuracy  0.4568 ± 0.0069\n"
        "passages         5,153\n"
        "dtype            fp32\n"
        "seconds          12.3\n"
    )


def test_a_terminal_gets_a_table():
    parent_end, child_end = pty.openpty()
    program = (
        "from mt_eval.report import Report, publish; publish(Report('lambada', 'm', 'd', {'accuracy': 0.5}, {}, {}, 1))"
    )
    subprocess.run([sys.executable, "-c", program], stdout=child_end, check=True)
    os.close(child_end)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(parent_end, 10_000).decode())
    os.close(parent_end)
    assert "│ accuracy │ 0.5000 │" in shown


def test_nothing_unfinished_is_left_beside_the_output(tmp_path):
    publish(REPORT, tmp_path / "r.json", iter([{"where": "d.jsonl:1", "text": "é"}, {"where": "d.jsonl:2"}]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.lambada.jsonl"]
    assert (tmp_path / "r.lambada.jsonl").read_text("utf-8") == (
        '{"where": "d.jsonl:1", "text": "é"}\n{"where": "d.jsonl:2"}\n'
    )


def test_a_metric_that_is_not_finite_is_refused_and_nothing_written(tmp_path):
    report = replace(REPORT, metrics={"loss": math.nan, "accuracy": 0.5, "perplexity": math.inf})
    with pytest.raises(MtError) as error:
        publish(report, tmp_path / "r.json")
    hint = "look for NaN and infinity in the weights (mt ckpt inspect), and try --dtype fp32"
    assert str(error.value) == f"lambada: loss is nan; {hint}\nlambada: perplexity is inf; {hint}"
    assert error.value.exit_code == 1
    assert not list(tmp_path.iterdir())
