"""Masks of dropout: pure functions of where an element stands, and good enough to pass for independent draws."""

import math

import pytest
import torch
from torch import Tensor

from mt_core.distributed.mesh import Axis
from mt_core.parallel.dropout import (
    DropoutKeys,
    LocalHeads,
    ProbabilityDropout,
    SequenceDropout,
    drop_features,
    drop_probabilities,
    fold,
    make_mask,
    mask_probabilities,
    number_heads,
    number_positions,
)
from mt_core.training.batch_inputs import add_dropout_keys
from mt_core.training.seeds import make_sample_keys
from tiny import built, gpt2

CPU = torch.device("cpu")
SAMPLES, TOKENS, SIZE = 16, 256, 128
SIGMAS = 5.0
"""What a normal variate is beyond once in 1.7 million draws; the seeds are fixed, so a test that passes always does."""


def model_keys(seed: int = 1234, first: int = 0, samples: int = SAMPLES, tokens: int = TOKENS) -> DropoutKeys:
    return DropoutKeys(make_sample_keys(seed, first, samples), number_positions(0, tokens, CPU))


def mask_features(keys: DropoutKeys, rate: float, site: int = 1, size: int = SIZE) -> Tensor:
    """What `drop_features` keeps, boolean [B, T, D]."""
    return drop_features(torch.ones(len(keys.samples_B), len(keys.positions_T), size), keys, rate, site) != 0


def standardise(kept: Tensor, rate: float) -> Tensor:
    """Mean 0 and variance 1, if the elements are what they should be."""
    return (kept.double() - (1 - rate)) / math.sqrt(rate * (1 - rate))


def correlate(one: Tensor, other: Tensor) -> float:
    """The correlation of two sets of standardised elements, in standard deviations of that of independent ones."""
    return float((one * other).sum()) / math.sqrt(one.numel())


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_as_many_elements_are_dropped_as_the_rate_says_and_the_mean_stays(rate):
    kept = mask_features(model_keys(), rate)
    assert abs(float(standardise(kept, rate).sum())) / math.sqrt(kept.numel()) < SIGMAS
    dropped = drop_features(torch.ones(SAMPLES, TOKENS, SIZE, dtype=torch.float64), model_keys(), rate, 1)
    assert torch.equal(dropped, kept.double() * (1 / (1 - rate)))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_sample_position_and_channel_drops_alike(rate):
    """χ² of the counts along each dim, as a normal variate."""
    z = standardise(mask_features(model_keys(), rate), rate)
    for dims in ((1, 2), (0, 2), (0, 1)):
        sums = z.sum(dims) / math.sqrt(z.numel() / z.shape[({0, 1, 2} - {*dims}).pop()])
        chi_square = float(sums.square().sum())
        assert abs(chi_square - len(sums)) < SIGMAS * math.sqrt(2 * len(sums)), dims


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbours_along_every_counter_are_independent(rate):
    keys = model_keys()
    z = standardise(mask_features(keys, rate), rate)
    one, two = (standardise(mask_features(layer, rate), rate) for layer in keys.split_layers(1, 2))
    others = {
        "site": standardise(mask_features(keys, rate, site=2), rate),
        "step": standardise(mask_features(model_keys(first=SAMPLES), rate), rate),
        "seed": standardise(mask_features(model_keys(seed=1235), rate), rate),
        "first layer": one,
    }
    found = {name: correlate(z, other) for name, other in others.items()} | {"layer": correlate(one, two)}
    for dim, name in enumerate(("sample", "position", "channel")):
        for distance in (1, 2, 3, 8):
            length = z.shape[dim] - distance
            found[f"{name} + {distance}"] = correlate(z.narrow(dim, 0, length), z.narrow(dim, distance, length))
    rows, columns = z[:, 1:] * z[:, :-1], z[:, :, 1:] * z[:, :, :-1]
    found["four corners"] = correlate(rows[:, :, 1:], rows[:, :, :-1])
    found["three channels"] = correlate(columns[:, :, 1:], z[:, :, :-2])
    assert {name: sigmas for name, sigmas in found.items() if abs(sigmas) > SIGMAS} == {}


def test_all_pairs_of_channels_and_of_rows_are_uncorrelated():
    z = standardise(mask_features(model_keys(), 0.5), 0.5).flatten(0, 1)
    for vectors in (z, z[:1024].T):
        sums = (vectors.T @ vectors / math.sqrt(len(vectors))).triu(1)
        pairs = vectors.shape[1] * (vectors.shape[1] - 1) // 2
        assert abs(float(sums.square().sum()) / pairs - 1) < SIGMAS * math.sqrt(2 / pairs) + 0.01
        assert float(sums.abs().max()) < 6.5


def attention_dropout(rate: float = 0.5, heads: int = 4, tokens: int = 64) -> ProbabilityDropout:
    keys = model_keys(samples=4, tokens=tokens)
    return ProbabilityDropout(
        rate, fold(keys.samples_B, 3), number_heads(heads, CPU), keys.positions_T, keys.positions_T
    )


def test_attention_s_masks_differ_by_sample_head_query_and_key():
    z = standardise(mask_probabilities(attention_dropout()), 0.5)
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < SIGMAS
    for dim in range(4):
        length = z.shape[dim] - 1
        assert abs(correlate(z.narrow(dim, 0, length), z.narrow(dim, 1, length))) < SIGMAS, dim
    assert abs(correlate(z, z.mT)) < SIGMAS + 2, "queries and keys are told apart"


def test_a_mask_of_a_part_is_the_part_of_the_mask():
    whole = mask_probabilities(attention_dropout())
    heads, queries, keys = torch.tensor([3, 1]), torch.tensor([5, 60, 7]), torch.arange(40, 50)
    part = attention_dropout()._replace(heads_H=heads.int(), queries_T=queries.int(), keys_S=keys.int())
    assert torch.equal(mask_probabilities(part), whole[:, heads][:, :, queries][..., keys])
    weights = torch.rand(4, 2, 2, 64, 64, dtype=torch.float64)
    expected = torch.where(whole.unflatten(1, (2, 2)), weights * 2, 0)
    assert torch.equal(drop_probabilities(weights, attention_dropout()), expected)


def test_ranks_of_a_tensor_axis_number_their_part_of_the_sequence_and_of_the_heads():
    x_BTD, keys = torch.ones(SAMPLES, TOKENS, SIZE), model_keys()
    whole = drop_features(x_BTD, keys, 0.3, 2)
    for rank in range(4):
        axis, local = Axis("tensor", rank, 4), slice(64 * rank, 64 * (rank + 1))
        assert torch.equal(SequenceDropout(axis, True)(x_BTD[:, local], keys, 0.3, 2), whole[:, local])
        assert torch.equal(SequenceDropout(axis, False)(x_BTD, keys, 0.3, 2), whole)
        assert LocalHeads(axis)(3, CPU).tolist() == [3 * rank, 3 * rank + 1, 3 * rank + 2]


def test_masks_are_those_that_earlier_runs_had():
    """A run must go on with the masks that it began with, so this hash may not change."""
    keys = model_keys(samples=2, tokens=8).split_layers(1, 1)[0]
    bits = make_mask(fold(fold(keys.samples_B, 3)[:, None], keys.positions_T), number_positions(0, 16, CPU), 0.5)
    rows = (bits.long() << torch.arange(16)).sum(-1)
    assert rows.tolist() == GOLDEN


GOLDEN = [
    [33506, 53793, 59966, 58533, 63935, 60119, 36014, 17742],
    [54622, 27319, 32926, 19403, 6118, 49356, 57290, 24482],
]
"""By sample and position, the first sixteen channels as bits."""


def test_a_sample_s_key_depends_on_its_number_in_the_run_alone():
    """Whatever the micro-batches and the data ranks."""
    whole = make_sample_keys(7, 96, 8).tolist()
    for micro, size in ((8, 1), (1, 1), (2, 2), (1, 8)):
        found = {}
        for rank in range(size):
            numbers = torch.arange(8).view(-1, size, micro)[:, rank]
            batches = [{"labels": sample[:, None]} for sample in numbers]
            for batch in add_dropout_keys(batches, 7, consumed=96, data=Axis("data", rank, size)):
                found |= dict(zip(batch["labels"][:, 0].tolist(), batch["dropout_keys"].tolist(), strict=True))
        assert [found[sample] for sample in range(8)] == whole
    assert make_sample_keys(7, 2**33, 1) != make_sample_keys(7, 0, 1)
    assert len({*make_sample_keys(7, 0, 1000).tolist()}) == 1000


RATES = {"attention": 0.1, "hidden": 0.2, "embedding": 0.3}


def test_a_compiled_block_is_one_graph_for_all_layers_and_steps():
    """Keys enter as tensors: neither a layer's number nor a step's makes torch compile again."""
    model, graphs = built(gpt2(layers=4, dropout=RATES)).train(), []
    tokens_BT = torch.arange(64).view(2, 32)

    def losses(first: int) -> Tensor:
        return model.token_losses(tokens_BT, tokens_BT, dropout_keys_B=make_sample_keys(0, first, 2))

    expected = [losses(first) for first in (0, 2, 4)]

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.layers.values():
        block.forward = torch.compile(block.forward, backend=count, fullgraph=True)
    found = [losses(first) for first in (0, 2, 4)]
    assert len(graphs) == 1
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-12, atol=1e-13)
    assert not torch.allclose(expected[0], expected[1])


@pytest.mark.slow
def test_a_compiled_mask_is_the_plain_one():
    rows, columns = torch.arange(-3000, 3000, dtype=torch.int32) * 715827, number_positions(0, 77, CPU)
    compiled = torch.compile(lambda: (fold(rows, 5), make_mask(rows, columns, 0.1)))()
    assert all(map(torch.equal, compiled, (fold(rows, 5), make_mask(rows, columns, 0.1))))


@pytest.mark.gpu
def test_masks_on_a_gpu_are_those_on_a_cpu():
    keys, x_BTD = model_keys(), torch.ones(SAMPLES, TOKENS, SIZE)
    there = DropoutKeys(*(tensor.cuda() for tensor in keys))
    expected = drop_features(x_BTD, keys, 0.1, 3)
    for function in (drop_features, torch.compile(drop_features)):
        assert torch.equal(function(x_BTD.cuda(), there, 0.1, 3).cpu(), expected)


def test_evaluation_drops_nothing_and_each_training_step_other_elements():
    model, plain, tokens_BT = built(gpt2(dropout=RATES)), built(gpt2()), torch.arange(32).view(2, 16)
    whole = plain.token_losses(tokens_BT, tokens_BT)
    keys = [make_sample_keys(0, first, 2) for first in (0, 0, 2)]
    one, same, other = (model.token_losses(tokens_BT, tokens_BT, dropout_keys_B=key) for key in keys)
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert torch.equal(model.eval().token_losses(tokens_BT, tokens_BT), whole)
    assert torch.equal(model(tokens_BT), plain(tokens_BT))
