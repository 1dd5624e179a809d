"""What mt-data must not import, how its rooms import each other, and what it registers."""

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mt_data
from mt_core.plugins import components
from mt_data.config import GPTData
from mt_data.plugin import mt_config_rules
from mt_models.config import GQA, Dense, GPTConfig, LayerNorm, Learned

MODULES = sorted(module.name for module in pkgutil.walk_packages(mt_data.__path__, "mt_data."))
SOURCE = Path(mt_data.__path__[0])
MOST_ROOMS, MOST_ARROWS = 13, 34
"""Rooms of mt_data, its folders and modules of the first level, and arrows between them; these numbers only fall.
The last to come lets conversations be read by the rules of all JSON lines."""


def imported_modules(file: Path) -> Iterator[str]:
    """Names of the modules of mt_data that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "mt_data":
            yield from (f"mt_data.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room_graph() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    graph: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        room = file.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room != "__init__":
            modules = [name.split(".") for name in imported_modules(file) if name.startswith("mt_data.")]
            graph.setdefault(room, set()).update({parts[1] for parts in modules} - {room})
    return graph


def test_rooms_and_the_arrows_between_them_do_not_multiply():
    graph = room_graph()
    assert len(graph) <= MOST_ROOMS, sorted(graph)
    arrows = sorted((room, other) for room, others in graph.items() for other in others)
    assert len(arrows) <= MOST_ARROWS, arrows


def test_no_room_imports_itself_through_others():
    order = list(TopologicalSorter(room_graph()).static_order())
    assert order.index("config") < order.index("datasets") < order.index("tools")


def imports(*modules: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    block = "".join(f"sys.modules[{name!r}] = None; " for name in blocked)
    load = "".join(f"importlib.import_module({name!r}); " for name in modules)
    return subprocess.run(
        [sys.executable, "-c", f"import importlib, sys; {block}{load}"], capture_output=True, text=True
    )


def test_every_module_but_the_loader_imports_without_torch():
    others = [name for name in MODULES if name != "mt_data.batching.loading"]
    assert len(others) > 20
    ran = imports(*others, blocked=("torch",))
    assert ran.returncode == 0, ran.stderr
    assert imports("mt_data.batching.loading", blocked=("torch",)).returncode != 0


@pytest.mark.parametrize(
    "module", ["mt_data", "mt_data.plugin", "mt_data.config", "mt_data.config.rules", "mt_data.command"]
)
def test_what_every_command_imports_is_light(module: str):
    ran = imports(module, blocked=("torch", "numpy", "tokenizers", "zstandard"))
    assert ran.returncode == 0, ran.stderr


def test_the_planner_looks_up_plugins_only_when_it_is_called():
    code = "import mt_data.tools.plan; from mt_core.plugins import manager; assert not manager.cache_info().currsize"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("command", {"data"}),
        ("tokenizer", {"GPT2BPETokenizer", "HuggingFaceTokenizer", "bytes"}),
        ("dataset", {"gpt"}),
    ],
)
def test_components_are_registered_and_load(kind: str, names: set[str]):
    known = components(kind)  # pyright: ignore[reportArgumentType]
    assert names <= known.keys()
    assert all(callable(known[name].load()) for name in names)


class Run:
    """The two sections that the rules look at, as `RunConfig` holds them."""

    def __init__(self, seq_length: int) -> None:
        self.data = GPTData(seq_length=seq_length)
        self.model = GPTConfig(
            layers=1,
            hidden_size=8,
            vocab_size=9,
            max_seq_len=64,
            attention=GQA(heads=1, num_kv_heads=1, head_size=8),
            mlp=Dense(ffn_hidden_size=8),
            norm=LayerNorm(),
            position=Learned(),
        )


def test_a_sequence_longer_than_the_models_positions():
    assert mt_config_rules(Run(64)) == []
    assert [str(problem) for problem in mt_config_rules(Run(65))] == [
        "data.seq_length: 65 is longer than the model's positions, model.max_seq_len = 64; at most 64"
    ]
