"""Types where they matter: pyright sees the sections of a run's configuration, and `Any` only ever gets rarer."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
MOST = {"config": 0, "model": 0, "any": 97}
"""How many parameters of these names, and of any, are annotated `Any`, hooks aside; lower it when there are fewer."""
PLUGIN_HOOKS = {"mt_config_rules"}
"""Functions that plugins implement for configurations of any kind."""

ATTEMPTS = """
from mt_core.config.run_config import RunConfig, TransformerRun
def misspell(config: RunConfig) -> float: return config.optim.clipnorm
def spell(config: RunConfig) -> float: return config.optim.clip_norm
def ask_model(config: RunConfig) -> int: return config.model.attention.heads
def ask_transformer(config: TransformerRun) -> int: return config.model.attention.heads
"""


def parameters() -> list[tuple[str, str, str]]:
    """File and function of each parameter that is annotated `Any`, and its name."""
    annotated = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                names = [a.arg for a in arguments if isinstance(a.annotation, ast.Name) and a.annotation.id == "Any"]
                if node.name in PLUGIN_HOOKS:
                    continue
                annotated += [(f"{path.relative_to(ROOT)}:{node.lineno}", node.name, name) for name in names]
    return annotated


@pytest.mark.parametrize("name", MOST)
def test_parameters_annotated_any_only_get_fewer(name):
    given = [f"{where} {function}" for where, function, given in parameters() if name in (given, "any")]
    assert len(given) <= MOST[name], "\n".join(given)


@pytest.mark.slow
def test_pyright_catches_a_misspelt_setting(tmp_path):
    (tmp_path / "attempts.py").write_text(ATTEMPTS)
    settings = {"include": ["."], "pythonVersion": "3.11", "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    problems = json.loads(output)["generalDiagnostics"]
    assert [(p["range"]["start"]["line"], p["rule"]) for p in problems] == [
        (2, "reportAttributeAccessIssue"),
        (4, "reportAttributeAccessIssue"),
    ]
