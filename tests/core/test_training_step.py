"""The training step on one rank: one loss however the batch is cut, and what a run keeps between steps (fp64)."""

import pytest
import torch

from layouts import run_config
from mt_core.checkpoint.native import resolve
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.parallel.context.zigzag import join_sequence
from mt_core.training.inputs import inputs, valid_tokens
from mt_core.training.optimizer import parameter_groups
from mt_core.training.step import backward, evaluate, reduce, update
from mt_core.verification.measure import save_state
from mt_core.verification.ranks import run_ranks
from rank_states import CPU, batches_of, state_of, step

MODELS = ["gqa", "learned-biased", "mha-tied"]
SAMPLES, LENGTH = 8, 16


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens of which a third count in the loss, unevenly over the rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (SAMPLES, LENGTH + 1), generator=generator)
    mask = torch.rand(SAMPLES, LENGTH, generator=generator) < torch.linspace(0.1, 0.6, SAMPLES)[:, None]
    return {"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask.float()}


def cut(batch: dict[str, torch.Tensor], micro_batches: int) -> list[dict[str, torch.Tensor]]:
    parts = [tensor.chunk(micro_batches) for tensor in batch.values()]
    return [dict(zip(batch, rows, strict=True)) for rows in zip(*parts, strict=True)]


def computed(model: str, micro_batches: int) -> dict[str, torch.Tensor]:
    """Loss, gradients, norm, updated weights and validation loss of a step."""
    state, batch = state_of(run_config(model)), batch_of()
    loss = backward(state.model, state.engine, cut(batch, micro_batches), valid_tokens([batch]), CPU)
    reduce(state.engine)
    found = {f"gradient {n}": m.grad.clone() for n, m in state.engine.masters.items() if m.grad is not None}
    norm = update(state.engine, state.optimizer, lr=1e-2, clip_norm=0.5).norm
    valid = torch.tensor(evaluate(state.model, cut(batch_of(9), micro_batches), Mesh(), CPU))
    return {"loss": loss, "norm": norm, "valid": valid, **found, **dict(state.model.named_parameters())}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_change_nothing(model, micro_batches):
    found, expected = computed(model, micro_batches), computed(model, 1)
    floor = expected["norm"] / 100  # the gradient of a key's bias is zero but for rounding
    for name, want in expected.items():
        assert (found[name] - want).abs().max() <= 1e-12 * max(want.abs().max(), floor), name


def test_the_loss_is_the_mean_over_valid_tokens_alone():
    state, batch = state_of(run_config()), batch_of()
    picked = -state.model(batch["tokens"]).log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    loss = backward(state.model, state.engine, [batch], valid_tokens([batch]), CPU)
    torch.testing.assert_close(loss, picked[batch["loss_mask"] == 1].mean().detach(), rtol=1e-12, atol=0)


def test_a_step_without_valid_tokens_has_no_loss_and_no_gradient():
    state, batch = state_of(run_config()), batch_of()
    batch["loss_mask"].zero_()
    assert backward(state.model, state.engine, [batch], valid_tokens([batch]), CPU) == 0
    reduce(state.engine)
    assert all(m.grad is not None and not m.grad.any() for m in state.engine.masters.values())


def test_only_matrices_decay():
    engine = state_of(run_config("learned-biased")).engine
    decaying, others = parameter_groups(engine.masters, engine.shapes, 0.1)
    plain = {id(p) for p in others["params"]}
    expected = {n for n in engine.masters if n.endswith(".bias") or "norm" in n}
    assert {n for n, p in engine.masters.items() if id(p) in plain} == expected
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_bf16_adds_up_gradients_and_updates_in_fp32():
    config = run_config(precision={"dtype": "bf16"})
    state = state_of(config)
    assert {p.dtype for p in state.model.parameters()} == {torch.bfloat16}
    batches = batches_of(config, Mesh())
    backward(state.model, state.engine, batches, SAMPLES * LENGTH, CPU)
    reduce(state.engine)
    assert all(p.grad is None for p in state.model.parameters())
    alone = torch.zeros(61, 32)
    for batch in batches:
        other = state_of(config)
        backward(other.model, other.engine, [batch], SAMPLES * LENGTH, CPU)
        reduce(other.engine)
        alone += other.engine.masters["head.weight"].grad[:61]
    whole = state.engine.masters["head.weight"].grad
    assert {m.grad.dtype for m in state.engine.masters.values()} == {torch.float32}
    assert torch.equal(whole[:61], alone), "in fp32 the sum of eight micro-batches"
    update(state.engine, state.optimizer, lr=1e-3, clip_norm=1.0)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, state.engine.masters[name].bfloat16()), name


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype, tmp_path):
    config = run_config(precision={"dtype": dtype, "initial_loss_scale": 64.0})
    state = state_of(config)
    for number in range(4):
        step(config, state, number)
        state.position.step += 1
        if number == 1:
            save_state(config, state, tmp_path)
    resumed = state_of(config)
    resumed.load(resolve(tmp_path))
    assert resumed.position.step == 2
    for number in (2, 3):
        step(config, resumed, number)
    for name, master in state.engine.masters.items():
        assert torch.equal(resumed.engine.masters[name], master), name


def packed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same two rows of documents, said by boundaries and by a mask of what must not be looked at."""
    batch = {key: value[:2] for key, value in batch_of().items()}
    lengths = torch.tensor([[5, 3, 8], [9, 4, 3]])
    ends = torch.nn.functional.pad(lengths.cumsum(-1), (1, 0)).int()
    number = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])
    hidden = ~((number[:, :, None] == number[:, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool())
    starts = torch.cat([torch.arange(n) for row in lengths for n in row]).view(2, LENGTH)
    batch["position_ids"] = starts
    return {**batch, "cu_seqlens": ends}, {**batch, "attention_mask": hidden[:, None]}


def test_boundaries_and_a_mask_say_the_same_documents_and_positions():
    by_ends, by_mask = (inputs(batch, Axis("context"), CPU) for batch in packed())
    assert torch.equal(by_ends.positions, by_mask.positions)
    same_ends, same_mask = (d[:, :, None] == d[:, None, :] for d in (by_ends.documents_BT, by_mask.documents_BT))
    assert torch.equal(same_ends, same_mask)
    model = state_of(run_config()).model
    losses = [
        model.token_losses(p.tokens_BT, p.labels_BT, positions=p.positions, documents_BT=p.documents_BT)
        for p in (by_ends, by_mask)
    ]
    assert torch.equal(*losses)


def test_without_documents_there_are_neither_numbers_nor_positions():
    found = inputs(batch_of(), Axis("context"), CPU)
    assert found.positions is None
    assert found.documents_BT is None


def shares(axis: Axis) -> dict[str, torch.Tensor]:
    """What the ranks of a context axis take, joined again."""
    found = inputs(packed()[0], axis, CPU)
    plain = inputs(batch_of(), axis, CPU)
    assert found.tokens_BT.shape == (2, LENGTH // axis.size)
    joined = {name: join_sequence(tensor, axis, 1) for name, tensor in found._asdict().items() if name != "more"}
    return joined | {"plain": join_sequence(plain.positions, axis, 0)}


def test_context_ranks_take_parts_that_join_to_the_whole():
    whole = inputs(packed()[0], Axis("context"), CPU)._asdict() | {"plain": torch.arange(LENGTH)}
    for joined in run_ranks(2, shares):
        for name, tensor in joined.items():
            assert torch.equal(tensor, whole[name]), name
