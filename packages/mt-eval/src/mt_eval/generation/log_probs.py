"""Log-probabilities of tokens in the model's own distribution: before temperature and filters (docs/specs/evaluation.md
§4.1).

Shape suffixes: N places, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mt_eval.generation.requests import TokenLogProb

if TYPE_CHECKING:
    from torch import Tensor


def score_tokens(logits_NV: "Tensor", tokens: Sequence[int], alternatives: int) -> list[TokenLogProb]:
    """What logits [N, V] say of one token each, and of the likeliest `alternatives` tokens; computed in fp64."""
    import torch

    log_probs_NV = logits_NV.double().log_softmax(-1)
    chosen_N = log_probs_NV.gather(-1, torch.tensor(tokens, device=logits_NV.device)[:, None])[:, 0].tolist()
    if not alternatives:
        return [TokenLogProb(log_prob) for log_prob in chosen_N]
    best_NV, ids_NV = find_likeliest(log_probs_NV, min(alternatives, logits_NV.shape[-1]))
    likeliest = [
        tuple(zip(ids, best, strict=True)) for ids, best in zip(ids_NV.tolist(), best_NV.tolist(), strict=True)
    ]
    return [TokenLogProb(log_prob, others) for log_prob, others in zip(chosen_N, likeliest, strict=True)]


def find_likeliest(scores_NV: "Tensor", count: int) -> "tuple[Tensor, Tensor]":
    """The highest scores and their ids, [N, count], in descending order; of equal ones the lower id is first."""
    least_N1 = scores_NV.topk(count, dim=-1).values[:, -1:]
    most = int((scores_NV >= least_N1).sum(-1).max())  # `topk` may take any of several equal ones
    ids_NV = scores_NV.topk(most, dim=-1).indices.sort(-1).values
    order_NV = scores_NV.gather(-1, ids_NV).sort(dim=-1, descending=True, stable=True).indices[:, :count]
    ids_NV = ids_NV.gather(-1, order_NV)
    return scores_NV.gather(-1, ids_NV), ids_NV
