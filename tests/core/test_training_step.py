"""The training step: the same loss, gradients and weights however the batch is cut and spread (fp64)."""

import pytest
import torch

from mt_core.config.sections import OptimConfig
from mt_core.parallel.axis import Axis
from mt_core.training.optimizer import adamw, parameter_groups
from mt_core.training.step import backward, evaluate, update, valid_tokens
from mt_core.training.weights import Weights
from ranks import run_ranks
from tiny import built, gpt2, llama

CPU = torch.device("cpu")
BATCH, LENGTH = 8, 16
EPS = 1e-2  # the gradient of a key bias is zero but for rounding; a small epsilon would make Adam amplify that


def batch_of(vocab: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens of which a third count in the loss, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (BATCH, LENGTH + 1), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) < torch.linspace(0.1, 0.6, BATCH)[:, None]).float()
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask}


def share(batch, axis: Axis, micro_batches: int):
    """This rank's micro-batches of a batch, as the sampler deals them."""
    size = BATCH // (axis.size * micro_batches)
    rows = [
        range((m * axis.size + axis.rank) * size, (m * axis.size + axis.rank + 1) * size) for m in range(micro_batches)
    ]
    return [{key: value[list(r)] for key, value in batch.items()} for r in rows]


def trained(axis: Axis, config, micro_batches: int, steps: int = 3) -> dict[str, list]:
    """Losses and gradient norms of some steps, the first step's gradients, and the weights at the end."""
    model = built(config)
    weights = Weights(model, torch.float64)
    optimizer = adamw(parameter_groups(weights.masters, 0.1), OptimConfig(eps=EPS))
    found = {"loss": [], "norm": []}
    for step in range(steps):
        batches = share(batch_of(config.vocab_size, step), axis, micro_batches)
        tokens = float(axis.sum_(torch.tensor(valid_tokens(batches), dtype=torch.float64)))
        found["loss"].append(float(axis.sum_(backward(model, batches, tokens, CPU))))
        if step == 0:
            gradients = {n: axis.sum_(p.grad.clone()) for n, p in weights.masters.items()}
            found["gradients"] = {n: g.tolist() for n, g in gradients.items()}
        found["norm"].append(float(update(weights, optimizer, axis, lr=1e-2, clip_norm=0.5)))
    found["weights"] = {n: p.tolist() for n, p in model.named_parameters()}
    valid = share(batch_of(config.vocab_size, 99), axis, micro_batches)
    found["valid"] = evaluate(model, valid, axis, CPU)
    return found


def assert_equal(found, expected) -> None:
    for key in ("loss", "norm", "valid"):
        assert found[key] == pytest.approx(expected[key], rel=1e-12)
    for key in ("gradients", "weights"):
        for name in expected[key]:
            want, have = (torch.tensor(side[key][name], dtype=torch.float64) for side in (expected, found))
            assert (have - want).abs().max() <= 1e-12 * want.abs().max(), name


@pytest.mark.parametrize("config", [llama(), gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_every_cut_of_the_batch_computes_the_same(config, ranks, micro_batches):
    expected = trained(Axis("data"), config, 1)
    if ranks == 1:
        assert_equal(trained(Axis("data"), config, micro_batches), expected)
        return
    for found in run_ranks(ranks, trained, config, micro_batches):
        assert_equal(found, expected)


def test_the_loss_is_the_mean_over_valid_tokens_alone():
    config = llama()
    model, batch = built(config), batch_of(config.vocab_size, 0)
    logits = model(batch["tokens"]).log_softmax(-1)
    picked = -logits.gather(-1, batch["labels"][..., None])[..., 0]
    expected = picked[batch["loss_mask"] == 1].mean()
    torch.testing.assert_close(
        backward(model, [batch], valid_tokens([batch]), CPU), expected.detach(), rtol=1e-12, atol=0
    )


def test_the_gradient_is_clipped_by_its_whole_norm():
    config = llama()
    model = built(config)
    weights = Weights(model, torch.float64)
    batch = batch_of(config.vocab_size, 0)
    backward(model, [batch], valid_tokens([batch]), CPU)
    norm = torch.cat([g.flatten() for g in weights.gradients()]).norm()
    seen = {}

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            seen["norm"] = torch.cat([p.grad.flatten() for p in weights.masters.values()]).norm()

    found = update(weights, Recorder(weights.masters.values(), lr=0.1), Axis("data"), lr=0.1, clip_norm=0.01)
    torch.testing.assert_close(found, norm.detach(), rtol=1e-12, atol=0)
    assert float(seen["norm"]) == pytest.approx(0.01, rel=1e-4)


def test_only_matrices_decay():
    model = built(gpt2())
    decaying, others = parameter_groups(dict(model.named_parameters()), 0.1)
    plain = {id(p) for p in others["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in plain} == {
        n for n, p in model.named_parameters() if n.endswith(".bias") or "norm" in n
    }
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_bf16_adds_up_gradients_and_updates_in_fp32():
    config = llama()
    exact, batch = built(config), batch_of(config.vocab_size, 0)
    backward(exact, share(batch, Axis("data"), 4), valid_tokens([batch]), CPU)
    model = built(config, dtype=torch.float32)
    weights = Weights(model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    backward(model, share(batch, Axis("data"), 4), valid_tokens([batch]), CPU)
    assert all(p.grad is None for p in model.parameters())
    for name, p in exact.named_parameters():
        grad = weights.masters[name].grad
        assert grad.dtype == torch.float32
        error = (grad.double() - p.grad).norm() / p.grad.norm()
        assert error < 0.02, name  # bf16 keeps 8 bits: 2^-8 an operation, a few tens of operations deep
    update(weights, adamw(parameter_groups(weights.masters, 0.1), OptimConfig()), Axis("data"), lr=1e-3, clip_norm=1.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights.masters[name].bfloat16())
