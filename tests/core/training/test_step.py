"""The training step on one rank: one loss however the batch is cut, and what a run keeps between steps (fp64)."""

from pathlib import Path

import pytest
import torch

from layouts import run_config
from mt_core.checkpoint.async_save import AsyncWriter
from mt_core.checkpoint.commit_protocol import Ranks
from mt_core.checkpoint.native import resolve
from mt_core.distributed.mesh import Axis, Mesh
from mt_core.errors import MtError
from mt_core.parallel.context.zigzag import gather_sequence
from mt_core.training.batch_inputs import add_dropout_keys, check_equal_sizes, prepare_inputs, valid_tokens
from mt_core.training.loop import Run, train
from mt_core.training.optimizer import parameter_groups
from mt_core.training.signals import GracefulStop
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
    parts = add_dropout_keys(cut(batch, micro_batches), 7, consumed=SAMPLES, data=Axis("data"))
    loss = backward(state.model, state.data_parallel, parts, valid_tokens([batch]), CPU).loss
    reduce(state.data_parallel)
    found = {f"gradient {n}": m.grad.clone() for n, m in state.data_parallel.main_params.items() if m.grad is not None}
    norm = update(state.data_parallel, state.optimizer, lr=1e-2, clip_norm=0.5).norm
    valid = torch.tensor(evaluate(state.model, cut(batch_of(9), micro_batches), Mesh(), CPU)["loss"])
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
    loss = backward(state.model, state.data_parallel, [batch], valid_tokens([batch]), CPU).loss
    torch.testing.assert_close(loss, picked[batch["loss_mask"] == 1].mean().detach(), rtol=1e-12, atol=0)


def test_a_step_without_valid_tokens_has_no_loss_and_no_gradient():
    state, batch = state_of(run_config()), batch_of()
    batch["loss_mask"].zero_()
    assert backward(state.model, state.data_parallel, [batch], valid_tokens([batch]), CPU).loss == 0
    reduce(state.data_parallel)
    assert all(m.grad is not None and not m.grad.any() for m in state.data_parallel.main_params.values())


def test_only_matrices_decay():
    data_parallel = state_of(run_config("learned-biased")).data_parallel
    decaying, others = parameter_groups(data_parallel.main_params, data_parallel.shapes, 0.1)
    plain = {id(p) for p in others["params"]}
    expected = {n for n in data_parallel.main_params if n.endswith(".bias") or "norm" in n}
    assert {n for n, p in data_parallel.main_params.items() if id(p) in plain} == expected
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_bf16_adds_up_gradients_and_updates_in_fp32():
    config = run_config(precision={"dtype": "bf16"})
    state = state_of(config)
    assert {p.dtype for p in state.model.parameters()} == {torch.bfloat16}
    batches = batches_of(config, Mesh())
    backward(state.model, state.data_parallel, batches, SAMPLES * LENGTH, CPU)
    reduce(state.data_parallel)
    assert all(p.grad is None for p in state.model.parameters())
    alone = torch.zeros(61, 32)
    for batch in batches:
        other = state_of(config)
        backward(other.model, other.data_parallel, [batch], SAMPLES * LENGTH, CPU)
        reduce(other.data_parallel)
        alone += other.data_parallel.main_params["head.weight"].grad[:61]
    whole = state.data_parallel.main_params["head.weight"].grad
    assert {m.grad.dtype for m in state.data_parallel.main_params.values()} == {torch.float32}
    assert torch.equal(whole[:61], alone), "in fp32 the sum of eight micro-batches"
    update(state.data_parallel, state.optimizer, lr=1e-3, clip_norm=1.0)
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, state.data_parallel.main_params[name].bfloat16()), name


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_a_resumed_run_goes_on_bit_for_bit(dtype, tmp_path):
    config = run_config("learned-biased", precision={"dtype": dtype, "initial_loss_scale": 64.0})
    assert config.model.dropout.is_active
    state = state_of(config)
    for number in range(4):
        step(config, state, number)
        state.position.step += 1
        if number == 1:
            save_state(config, state, tmp_path)
    resumed = state_of(config)
    resumed.load(resolve(tmp_path), config.precision)
    assert resumed.position.step == 2
    for number in (2, 3):
        step(config, resumed, number)
    for name, main_param in state.data_parallel.main_params.items():
        assert torch.equal(resumed.data_parallel.main_params[name], main_param), name


def packed() -> dict[str, torch.Tensor]:
    """Two rows of three documents each, with their segment ids and positions."""
    batch = {key: value[:2] for key, value in batch_of().items()}
    lengths = torch.tensor([[5, 3, 8], [9, 4, 3]])
    batch["segment_ids"] = torch.stack([torch.arange(3).repeat_interleave(row) for row in lengths])
    batch["position_ids"] = torch.cat([torch.arange(n) for row in lengths for n in row]).view(2, LENGTH)
    return batch


def test_a_model_gets_exactly_the_keys_that_it_declares():
    model, axis = state_of(run_config()).model, Axis("context")
    plain, whole = (prepare_inputs(model, batch, axis, CPU) for batch in (batch_of(), packed()))
    assert list(plain.arguments) == ["tokens_BT", "labels_BT"]
    assert list(whole.arguments) == ["tokens_BT", "labels_BT", "positions", "segment_ids_BT"]
    assert torch.equal(whole.arguments["segment_ids_BT"], packed()["segment_ids"])


def test_the_number_of_a_blend_s_dataset_is_for_no_model():
    model = state_of(run_config()).model
    batch = batch_of() | {"dataset_id": torch.zeros(SAMPLES)}
    assert "dataset_id" not in prepare_inputs(model, batch, Axis("context"), CPU).arguments


def test_keys_that_a_model_does_not_know_and_keys_that_it_lacks_are_named():
    model, batch = state_of(run_config()).model, batch_of() | {"segment_id": torch.zeros(SAMPLES)}
    del batch["tokens"]
    with pytest.raises(MtError) as error:
        prepare_inputs(model, batch, Axis("context"), CPU)
    assert str(error.value).splitlines() == [
        "batch: unknown key 'segment_id' for a model of kind 'gpt'; did you mean 'segment_ids'? "
        "allowed: tokens, labels, position_ids, segment_ids, padding_mask, dropout_keys, row_positions",
        "batch: has no 'tokens', only labels, loss_mask, segment_id; a model of kind 'gpt' needs it",
    ]


def shares(axis: Axis) -> dict[str, torch.Tensor]:
    """What the ranks of a context axis take, joined again."""
    model = state_of(run_config()).model
    found, plain = (prepare_inputs(model, batch, axis, CPU) for batch in (packed(), batch_of()))
    assert found.arguments["tokens_BT"].shape == (2, LENGTH // axis.size)
    parts = found.arguments | {"mask": found.loss_mask_BT}
    joined = {name: gather_sequence(tensor, axis, 1) for name, tensor in parts.items()}
    return joined | {"plain": gather_sequence(plain.arguments["positions"], axis, 0)}


def test_context_ranks_take_parts_that_join_to_the_whole():
    found = prepare_inputs(state_of(run_config()).model, packed(), Axis("context"), CPU)
    whole = found.arguments | {"mask": found.loss_mask_BT, "plain": torch.arange(LENGTH)}
    for joined in run_ranks(2, shares):
        assert joined.keys() == whole.keys()
        for name, tensor in joined.items():
            assert torch.equal(tensor, whole[name]), name


SIZES = {
    "equal": [[(1, 8), (1, 8)], [(1, 8), (1, 8)], [(1, 8), (1, 8)]],
    "equal in sum": [[(1, 6), (1, 8)], [(2, 3), (2, 4)], [(3, 2), (1, 8)]],
    "the mean on one rank": [[(1, 8), (1, 6)], [(1, 8), (1, 7)], [(1, 8), (1, 8)]],
    "in another order": [[(1, 6), (1, 8)], [(1, 8), (1, 6)], [(1, 6), (1, 8)]],
}
"""Shapes of two micro-batches' labels on each of three ranks."""
HINT = 'parallel.token_dispatcher = "all_gather" needs equal ones: make samples of one length, or set "all_to_all"'


def refusals_of_sizes(axis: Axis) -> dict[str, str]:
    found = {}
    for case, ranks in SIZES.items():
        try:
            check_equal_sizes([{"labels": torch.zeros(shape)} for shape in ranks[axis.rank]], axis)
        except MtError as err:
            found[case] = str(err)
    return found


def test_micro_batches_of_other_sizes_are_refused_by_every_rank_with_the_same_words():
    expected = {
        "the mean on one rank": f"batch: ranks have 6 to 8 tokens in micro-batch 2; {HINT}",
        "in another order": "batch: ranks have 6 to 8 tokens in micro-batch 1, 6 to 8 tokens in micro-batch 2; " + HINT,
    }
    assert run_ranks(3, refusals_of_sizes) == [expected] * 3


def trained_unequally(axis: Axis, folder: Path, sizes: list[int], valid_sizes: list[int]) -> str:
    """What the training loop says of sequences that are as long as `sizes`, by rank, in its second step; `valid_sizes`
    are those of its validation."""
    parallel = {"expert": 2, "token_dispatcher": "all_gather"}
    batch, train_keys = {"micro_batch": 1, "global_batch": 2}, {"steps": 2, "eval_every": 1, "eval_batches": 1}
    config = run_config("experts", parallel=parallel, batch=batch, train=train_keys)

    def make(length: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(length)[None]
        return {"tokens": ids, "labels": ids, "loss_mask": torch.ones_like(ids).float()}

    state = state_of(config, axis.size)
    run = Run(
        config=config,
        state=state,
        mesh=state.data_parallel.mesh,
        device=CPU,
        train_batches=iter([make(16), make(sizes[axis.rank])]),
        valid_batches={"": lambda: iter([make(valid_sizes[axis.rank])])},
        sinks=[],
        writer=AsyncWriter(folder, Ranks(axis.rank, axis.size, "test")),
        global_batch=lambda samples: 2,
    )
    try:
        train(run, GracefulStop())
    except MtError as err:
        return f"{err} in step {state.position.step + 1}"
    return ""


@pytest.mark.parametrize(
    ("sizes", "valid_sizes", "expected"),
    [
        ([16, 12], [16, 16], f"batch: ranks have 12 to 16 tokens in micro-batch 1; {HINT} in step 2"),
        ([16, 16], [8, 12], f"batch: ranks have 8 to 12 tokens in micro-batch 1; {HINT} in step 2"),
        ([12, 12], [8, 8], ""),
    ],
    ids=["training", "validation", "equal"],
)
def test_no_rank_waits_for_one_whose_tokens_cannot_be_gathered(sizes, valid_sizes, expected, tmp_path):
    assert run_ranks(2, trained_unequally, tmp_path, sizes, valid_sizes) == [expected] * 2
