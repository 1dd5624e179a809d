"""A model with a loss and a metric of each sample, as for classification: both are right under every data layout."""

from types import MappingProxyType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layouts import run_config
from mt_core.contracts import BatchKey, Losses, MetricSum
from mt_core.distributed.mesh import Axis, make_mesh
from mt_core.distributed.topology import resolve_dims
from mt_core.parallel.data.protocol import make_data_parallel
from mt_core.parallel.tensor.placement import apply_plan
from mt_core.parallel.tensor.plan import Replicate
from mt_core.training.step import backward, evaluate, reduce, reduce_metrics
from mt_core.verification.ranks import run_ranks

CPU = torch.device("cpu")
LENGTHS = (3, 1, 1, 3)
"""Samples of each micro-batch, as many on each of two ranks: uneven, so that a mean of means is not the mean."""


class Classifier(nn.Module):
    """The mean of a sequence's embeddings through a linear layer, to three classes."""

    config = SimpleNamespace(kind="classifier")
    batch_keys = MappingProxyType(
        {"tokens": BatchKey("tokens_BT", required=True), "labels": BatchKey("labels_B", required=True)}
    )

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleDict({"0": nn.Linear(8, 3)})

    def losses(self, tokens_BT: Tensor, labels_B: Tensor) -> Losses:
        logits_BC = self.layers["0"](self.embed(tokens_BT).mean(1))
        hits = (logits_BC.argmax(-1) == labels_B).sum()
        samples = F.cross_entropy(logits_BC, labels_B, reduction="none")
        return Losses(samples=samples, metrics={"accuracy": MetricSum(hits, torch.tensor(len(labels_B)))})


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "tokens": torch.randint(11, (samples, 5), generator=generator),
            "labels": torch.randint(3, (samples,), generator=generator),
        }
        for samples in LENGTHS
    ]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (11, 8), "layers.0.weight": (3, 8), "layers.0.bias": (3,)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def trained(axis: Axis, sharding: str) -> dict[str, float | dict[str, float]]:
    """The loss, accuracy and norm of a step over all batches, dealt out to the ranks, and an evaluation of them."""
    config = run_config(parallel={"sharding": sharding})
    mesh = make_mesh(resolve_dims(config.parallel, axis.size))
    with torch.device("meta"):
        model = Classifier()
    placements = apply_plan(model, {"embed": Replicate(), "layers.0": Replicate()}, mesh.tensor, sequence=False)
    data_parallel = make_data_parallel(
        model, placements, mesh, device=CPU, precision=config.precision, parallel=config.parallel
    )
    shard, _ = mesh.shard_axes(mesh.tensor)
    for name, main_param in data_parallel.main_params.items():
        main_param.data.copy_(data_parallel.local_shard(name, weights()[name], shard.rank))
    data_parallel.all_gather_params()
    data_parallel.wait()
    mine = batches()[axis.rank :: axis.size]
    evaluated = evaluate(model, mine, mesh, CPU)
    losses = backward(model, data_parallel, mine, 0.0, CPU)
    reduce(data_parallel)
    loss = float(mesh.data_context.sum_(losses.loss.clone()))
    square = mesh.shard.sum_(
        sum((m.grad.square().sum() for m in data_parallel.main_params.values()), torch.zeros(()).double())
    )
    return {"loss": loss, "square": float(square), **reduce_metrics(mesh, losses.metrics), "valid": evaluated}


def expected() -> tuple[float, float, float]:
    state = {name: weight.requires_grad_() for name, weight in weights().items()}
    tokens, labels = (torch.cat([batch[key] for batch in batches()]) for key in ("tokens", "labels"))
    logits = state["embed.weight"][tokens].mean(1) @ state["layers.0.weight"].T + state["layers.0.bias"]
    loss = F.cross_entropy(logits, labels)
    square = sum(float(gradient.square().sum()) for gradient in torch.autograd.grad(loss, [*state.values()]))
    return float(loss.detach()), square, float((logits.argmax(-1) == labels).double().mean())


@pytest.mark.parametrize("sharding", ["replicate", "zero1", "fsdp"])
def test_accuracy_and_the_loss_of_samples_on_two_ranks(sharding):
    loss, square, accuracy = (pytest.approx(value, rel=1e-12) for value in expected())
    for found in run_ranks(2, trained, sharding):
        assert found["accuracy"] == found["valid"]["accuracy"] == accuracy
        assert found["loss"] == found["valid"]["loss"] == loss
        assert found["square"] == square
