"""The Python in the package's README runs and prints what it says."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "packages" / "mt-models" / "README.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(compile(example, str(README), "exec"), {})
    printed = re.findall(r"# prints (.*)", example)
    assert printed
    assert capsys.readouterr().out.splitlines() == printed
