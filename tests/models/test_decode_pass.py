"""A pass of one token a row, of fixed shapes, gives what a pass through the cache's spans gives."""

import importlib
import sys

import pytest
import torch

from eval.conftest import CONFIG
from eval.generation.families import make_family
from mt_models.config import GPTConfig
from mt_models.layers import decode_pass
from mt_models.layers.decode_pass import DecodePass
from mt_models.layers.kv_cache import Span

WIDE = {"heads": 8, "num_kv_heads": 2, "head_size": 16}
LENGTHS, SCRATCH = (3, 17, 8, 1), 31


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in Triton's interpreter, whose bounds of loops are arrays, which numpy 2.4 refuses as numbers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    scope = interpreter._LangPatchScope
    set_attr = scope.set_attr

    def set_attribute(self, target, name, value):
        set_attr(self, target, name, (lambda tensor: tensor.handle.data.item()) if name == "__index__" else value)

    monkeypatch.setattr(scope, "set_attr", set_attribute)
    name = "mt_models.layers.decode_kernels"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, name, raising=False)
    kernels = importlib.import_module(name)
    del sys.modules[name], sys.modules["mt_models.layers"].decode_kernels
    monkeypatch.setattr(decode_pass, "import_kernels", lambda: kernels)


def fill_cache(model):
    """A cache with sequences of some lengths, and their tables."""
    cache, tables, first = model.make_cache(SCRATCH + 1, 4), [], 1
    for length in LENGTHS:
        tables.append(list(range(first, first + length // 4 + 1)))
        first += len(tables[-1])
    spans = [Span(0, length, table) for length, table in zip(LENGTHS, tables, strict=True)]
    tokens = torch.randint(97, (sum(LENGTHS), 1), generator=torch.Generator().manual_seed(0))
    model.hidden(tokens.to(cache.k.device), cache=cache.place(spans))
    return cache, tables


def write_rows(tables, tokens, extra=2):
    """The rows of the next tokens, and some that nobody needs."""
    rows = torch.zeros(len(tables) + extra, 2 + 8, dtype=torch.int32)
    rows[len(tables) :, 2] = SCRATCH
    for row, (table, length, token) in enumerate(zip(tables, LENGTHS, tokens, strict=True)):
        rows[row, 0], rows[row, 1] = token, length
        rows[row, 2 : 2 + len(table)] = torch.tensor(table)
    return rows


def check_model(model, device="cpu", dtype=torch.float32, *, kernels=False, tolerance=2e-5):
    model, tokens = model.to(device, dtype), [5, 6, 7, 8]
    with torch.inference_mode():
        cache, tables = fill_cache(model)
        rows = write_rows(tables, tokens).to(device)
        step = DecodePass(cache, rows, kernels=kernels)
        actual = model.hidden(step.tokens_N1, cache=step)[: len(tables)]
        spans = [Span(length, 1, table) for length, table in zip(LENGTHS, tables, strict=True)]
        expected = model.hidden(torch.tensor(tokens, device=device)[:, None], cache=cache.place(spans))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "mla", "moe"])
def test_rows_of_fixed_shapes_are_spans_of_one_token(name):
    check_model(make_family(name))


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])  # heads of their own without angles; groups, windows, a softcap
def test_the_kernels_in_triton_s_interpreter_are_torch_s(name, interpreted):
    check_model(make_family(name), kernels=True)


@pytest.mark.gpu
def test_the_kernels_on_a_gpu_are_torch_s():
    model = GPTConfig.model_validate(CONFIG | {"vocab_size": 97, "hidden_size": 64, "attention": WIDE}).build()
    model.initialize(3)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        check_model(model.eval().requires_grad_(False), "cuda", dtype, kernels=True, tolerance=tolerance)


def test_the_kernels_compile_for_a_gpu_that_is_not_here():
    compiler = pytest.importorskip("triton.compiler")
    from triton.backends.compiler import GPUTarget

    from mt_models.layers import decode_kernels

    pointers = dict.fromkeys(("q", "k", "v", "q_out", "k_cache", "v_cache", "out"), "*bf16")
    pointers |= {"cos": "*fp32", "sin": "*fp32", "slots": "*i64", "positions": "*i64", "tables": "*i32"}
    types = pointers | {"scale": "fp32", "softcap": "fp32"}
    attend = {"queries": 4, "rows": 16, "size": 128, "block_size": 16, "tile": 64, "capped": True}
    for kernel, constants in (
        (decode_kernels._store_kernel, {"heads": 32, "size": 128, "rotated": True}),
        (decode_kernels._attend_kernel, attend),
    ):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        places = {(names.index(name),): value for name, value in constants.items()}
        source = compiler.ASTSource(kernel, signature, places)
        assert compiler.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
