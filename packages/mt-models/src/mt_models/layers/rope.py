"""Rotary positions, half-split pairing: feature i turns with feature i + K/2 (arXiv:2104.09864; Llama's layout).

Shape suffixes: T positions, K head size, L = K/2 pairs. Angles are exact to the table's dtype: fp32, or fp64 in an fp64
model, whatever the activations are.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mt_models import config

Scaling = config.Linear | config.Llama3 | config.YaRN


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [T, 1, L] or [B, T, 1, L], to be broadcast over heads."""

    cos_T1L: Tensor
    sin_T1L: Tensor


def make_rotation(
    positions_T: Tensor, head_size: int, *, theta: float, dtype: torch.dtype, scaling: Scaling | None = None
) -> Rotation:
    """Angles position · frequency of every pair, of positions [T] or [B, T]; `dtype` is at least fp32."""
    pairs_L = torch.arange(0, head_size, 2, device=positions_T.device).to(dtype)
    frequencies_L = scale_frequencies(1.0 / theta ** (pairs_L / head_size), scaling, theta)
    angles_T1L = (positions_T.to(dtype)[..., None] * frequencies_L)[..., None, :]
    factor = get_attention_factor(scaling)
    return Rotation(angles_T1L.cos() * factor, angles_T1L.sin() * factor)


def scale_frequencies(plain_L: Tensor, scaling: Scaling | None, theta: float) -> Tensor:
    """The frequencies theta^(−2i/K), changed for longer sequences."""
    match scaling:
        case None:
            return plain_L
        case config.Linear():
            return plain_L / scaling.factor
        case config.Llama3():
            kept_L = _kept_by_turns(scaling, plain_L)
        case config.YaRN():
            kept_L = _kept_by_index(scaling, plain_L, theta)
    return kept_L * plain_L + (1 - kept_L) * plain_L / scaling.factor


def get_attention_factor(scaling: Scaling | None) -> float:
    """Factor of cos and sin, which sharpens attention: above 1 with YaRN, else 1 (arXiv:2309.00071, §3.4)."""
    return scaling.rotary_factor if isinstance(scaling, config.YaRN) else 1.0


def _kept_by_turns(scaling: config.Llama3, plain_L: Tensor) -> Tensor:
    """Share of each frequency that is kept, from 0 to 1, by its turns within the original positions."""
    turns_L = scaling.original_positions * plain_L / (2 * math.pi)
    low, high = scaling.low_frequency, scaling.high_frequency
    return ((turns_L - low) / (high - low)).clamp(0, 1)


def _kept_by_index(scaling: config.YaRN, plain_L: Tensor, theta: float) -> Tensor:
    """Share of each frequency that is kept, by the pair's index: a ramp from `beta_fast` to `beta_slow` turns, its ends
    rounded outwards."""
    pairs = len(plain_L)

    def find_pair(turns: float) -> float:
        return pairs * math.log(scaling.original_positions / (turns * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(find_pair(scaling.beta_fast)), 0)
    last = min(math.ceil(find_pair(scaling.beta_slow)), 2 * pairs - 1)
    width = max(last - first, 0.001)  # no step: pairs before `first` are kept, those after it are not
    index_L = torch.arange(pairs, device=plain_L.device).to(plain_L.dtype)
    return 1 - ((index_L - first) / width).clamp(0, 1)


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn every pair of every head by its position's angle; the products are formed in the table's dtype."""
    cos_T1L, sin_T1L = rotation
    a_BTHL, b_BTHL = x_BTHK.chunk(2, dim=-1)
    rotated_BTHK = torch.cat((a_BTHL * cos_T1L - b_BTHL * sin_T1L, b_BTHL * cos_T1L + a_BTHL * sin_T1L), dim=-1)
    return rotated_BTHK.to(x_BTHK.dtype)
