"""`mt ckpt upcycle`: a dense model as a mixture of experts that computes the same."""

import pytest
import torch

from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits
from mt_core.checkpoint.detection import open_checkpoint
from mt_core.errors import MtError

TOKENS_BT = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def dense(save_model, tmp_path):
    convert("hf", save_model("llama"), "native", tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 3)])
def test_the_mixture_computes_the_same(experts, top_k, dense, tmp_path):
    sizes = ["--experts", experts, "--top-k", top_k]
    done = mt_ckpt("upcycle", dense, "--save-dir", tmp_path / "moe", *sizes)
    source, result = open_checkpoint(dense), open_checkpoint(tmp_path / "moe")
    parameters = result.config().parameter_count
    assert done.stdout == f"wrote {tmp_path / 'moe'}: 3 layers of {experts} experts, {parameters:,} parameters\n"
    assert (result.config().mlp.experts, result.config().mlp.top_k) == (experts, top_k)
    expected_BTV, logits_BTV = our_logits(source, TOKENS_BT), our_logits(result, TOKENS_BT)
    assert (logits_BTV - expected_BTV).abs().max() <= 1e-6 * expected_BTV.abs().max()


def test_experts_are_copies_and_routers_differ_by_layer_and_seed(dense, tmp_path):
    made = []
    for seed in (0, 0, 1):
        path = tmp_path / f"moe-{len(made)}"
        mt_ckpt("upcycle", dense, "--save-dir", path, "--experts", 4, "--seed", seed)
        made.append(dict(open_checkpoint(path).tensors()))
    source = dict(open_checkpoint(dense).tensors())
    for part in ("gate", "up", "down"):
        copies = made[0][f"layers.1.mlp.experts.{part}.weight"]
        assert all(torch.equal(one, source[f"layers.1.mlp.{part}.weight"]) for one in copies)
    routers = [tensors[f"layers.{n}.mlp.router.weight"] for tensors in made for n in (0, 1)]
    assert torch.equal(routers[0], routers[2])
    assert not torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[4])


def test_dtypes_stay(save_model, tmp_path):
    mt_ckpt("upcycle", save_model("llama", dtype=torch.bfloat16), "--save-dir", tmp_path / "moe", "--experts", 2)
    assert {tensor.dtype for _, tensor in open_checkpoint(tmp_path / "moe").tensors()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("family", "changes", "sizes", "message"),
    [
        ("gpt2", {}, (4, 2), "a 'gpt' model whose mlp.kind is 'dense' with biases; experts are gated layers without"),
        ("llama", {"mlp_bias": True}, (4, 2), "mlp.kind is 'gated' with biases; experts are gated layers"),
        ("llama", {}, (2, 3), "--experts, --top-k: top_k 3 is more than experts 2; 2 <= top-k <= experts"),
    ],
)
def test_what_cannot_become_a_mixture_is_refused(family, changes, sizes, message, save_model, tmp_path):
    path = save_model(family, **changes)
    with pytest.raises(MtError, match=message):
        mt_ckpt("upcycle", path, "--save-dir", tmp_path / "moe", "--experts", sizes[0], "--top-k", sizes[1])
    assert not list(tmp_path.glob("moe*"))
