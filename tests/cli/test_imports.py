"""The contract of imports: which package may use which, what is free of torch, and what `mt --help` must not load."""

import ast
import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mt_core.config
import mt_core.pipeline
import mt_core.planning
import mt_data

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "mt_core": set(),
    "mt_data": {"mt_core"},
    "mt_models": {"mt_core"},
    "mt_ckpt": {"mt_core", "mt_models"},
    "mt_eval": {"mt_core", "mt_data", "mt_models"},
    "mt_cli": {"mt_core", "mt_data", "mt_models", "mt_ckpt", "mt_eval"},
}
COMMAND_MODULES = ("command", "options")
"""How the names end of modules that only `mt` imports; besides them, mt-cli and `mt_core.cli` use Typer."""

Import = tuple[str, str]
"""Module that imports, module that is imported."""


def imports(package: str) -> Iterator[Import]:
    """Every import statement of a package, those inside functions and for type checkers included."""
    root = ROOT / "packages" / package.replace("_", "-") / "src"
    for file in sorted(root.rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports relatively"
                yield module, node.module or ""


def is_command(module: str) -> bool:
    return module.startswith(("mt_cli.", "mt_core.cli.")) or module.endswith(COMMAND_MODULES)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package):
    pairs = list(imports(package))
    assert len(pairs) > 20
    allowed = MAY_IMPORT[package] | {package}
    wrong = [
        (module, imported)
        for module, imported in pairs
        if (top := imported.partition(".")[0]).startswith("mt_") and top not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_command_modules_import_typer(package):
    assert not [
        module for module, imported in imports(package) if imported.split(".")[0] == "typer" and not is_command(module)
    ]


def requirements(name: str, extras: frozenset[str] = frozenset()) -> set[Requirement]:
    """What installing a distribution with these extras asks for directly."""
    all_requirements = map(Requirement, importlib.metadata.requires(name) or ())
    return {
        r
        for r in all_requirements
        if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras | {""})
    }


def installed_with(*names: str) -> set[str]:
    """Names of all distributions that installing these brings, themselves included; extras only if asked for."""
    installed: set[tuple[str, frozenset[str]]] = set()
    waiting = [(name, frozenset[str]()) for name in names]
    while waiting:
        if (this := waiting.pop()) not in installed:
            installed.add(this)
            waiting += [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements(*this)]
    return {name for name, _ in installed}


@pytest.mark.parametrize("names", [["mt-data"], ["mt-core"], ["mt-cli"], ["mt-cli", "mt-data"]])
def test_installing_without_a_model_brings_no_torch(names):
    brought = installed_with(*names)
    assert {"mt-core", "pydantic", *names} <= brought
    assert not brought & {"torch", "mt-models", "safetensors"}


@pytest.mark.parametrize("name", ["mt-models", "mt-ckpt", "mt-eval"])
def test_installing_a_model_brings_torch(name):
    assert "torch" in installed_with(name)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_what_a_package_imports_of_ours_is_installed_with_it(package):
    """mt-cli's commands are extras; its commands of other packages come with those."""
    name = package.replace("_", "-")
    extras = ["data", "train", "ckpt", "eval"] if name == "mt-cli" else []
    brought = installed_with(name) | {r.name for r in requirements(name, frozenset(extras))}
    used = {imported.partition(".")[0] for _, imported in imports(package)}
    assert {top.replace("_", "-") for top in used if top.startswith("mt_")} <= brought


TORCH_FREE = [
    *(
        f"mt_core.{name}"
        for name in ("errors", "plugins", "plugin_options", "contracts", "files", "progress", "training.lr_schedule")
    ),
    *(module.name for module in pkgutil.walk_packages(mt_core.config.__path__, "mt_core.config.")),
    *(module.name for module in pkgutil.walk_packages(mt_core.pipeline.__path__, "mt_core.pipeline.")),
    *(module.name for module in pkgutil.walk_packages(mt_core.planning.__path__, "mt_core.planning.")),
    *(
        module.name
        for module in pkgutil.walk_packages(mt_data.__path__, "mt_data.")
        if module.name != "mt_data.batching.loading"
    ),
    *(f"mt_models.{name}" for name in ("config", "plugin", "presets")),
    *(f"mt_cli.{name}" for name in ("main", "run_config", "config", "plugins_command")),
    *(f"mt_core.cli.{name}" for name in ("plugin_group", "completion", "options")),
    *("mt_core.plugin", "mt_ckpt.plugin", "mt_ckpt.command", "mt_ckpt.formats", "mt_eval.plugin", "mt_cli.plugin"),
    *("mt_eval.tasks.command", "mt_eval.harness.command", "mt_eval.generation.command", "mt_cli.train.command"),
]


def test_torch_free_modules_import_with_torch_blocked(blocking):
    """Each in turn in one process; the ones that fail are named."""
    source = """
import importlib, json, sys
failed = {}
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except Exception as err:
        failed[name] = repr(err)
print(json.dumps(failed))
"""
    environment = {"PYTHONPATH": str(blocking("torch"))}
    words = [sys.executable, "-c", source]
    ran = subprocess.run([*words, *TORCH_FREE], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {}
    ran = subprocess.run(
        [*words, "mt_data.batching.loading"], env=environment, capture_output=True, text=True, check=True
    )
    assert "torch was imported" in ran.stdout  # the blocker works


def test_help_imports_none_of_the_heavy_packages():
    source = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); sys.argv = ['mt', '--help']"
    )
    words = [sys.executable, "-c", f"{source}; from mt_cli.main import main; main()"]
    ran = subprocess.run(words, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in ran.stderr.split()}
    assert ran.stdout.startswith("Usage: mt ")
    assert {"typer", "pluggy", "mt_core", "mt_models"} <= imported
    assert not imported & {"torch", "numpy", "pydantic", "rich", "tokenizers", "safetensors", "transformers"}


@pytest.mark.parametrize("command", ["data", "ckpt", "eval", "eval harness", "generate", "serve", "train", "config"])
def test_help_of_a_command_imports_no_torch(mt, blocking, command):
    ran = mt(*command.split(), "--help", PYTHONPATH=blocking("torch", "lm_eval"))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"Usage: mt {command} ")


def test_preprocessing_never_imports_torch(mt, blocking, tmp_path):
    texts = [Path(ast.__file__).read_text()[start : start + 500] for start in range(0, 50_000, 500)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", tmp_path / "corpus.jsonl", "--output-prefix", tmp_path / "out", "--tokenizer-type", "bytes"]
    path = blocking("torch")
    ran = mt("data", "preprocess", *words, "--append-eod", "--workers", 2, PYTHONPATH=path)
    assert ran.returncode == 0, ran.stderr
    ids = [*"".join(texts).encode()]
    assert (tmp_path / "out_text_document.bin").stat().st_size == 2 * (len(ids) + len(texts))
    shown = mt(
        "data", "inspect", tmp_path / "out_text_document", "--document", 1, "--tokenizer-type", "bytes", PYTHONPATH=path
    )
    assert shown.stdout.count(texts[1]) == 1


def test_configurations_are_shown_and_checked_without_torch(mt, blocking):
    path = blocking("torch")
    assert "layers = 12\n" in mt("config", "show", "--preset", "gpt2-124m", PYTHONPATH=path).stdout
    assert mt("config", "check", "--preset", "gpt2-124m", PYTHONPATH=path).stdout.startswith(
        "ok: 124,439,808 parameters"
    )


@pytest.mark.slow
def test_what_compiles_nothing_does_not_import_dynamo():
    """It takes a second, in every process of every command."""
    modules = "mt_ckpt.tools.inspect, mt_eval.load, mt_models.models.gpt, mt_core.parallel.apply, mt_core.training.loop"
    script = f"import sys, {modules}; print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"
