"""Rotary positions, half-split pairing: feature i turns with feature i + K/2 (arXiv:2104.09864; Llama's layout).

Shape suffixes: T positions, K head size, L = K/2 pairs. Angles are exact to the table's dtype: fp32, or fp64 in an fp64
model, whatever the activations are.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, [T, 1, L] or [B, T, 1, L], to be broadcast over heads."""

    cos_T1L: Tensor
    sin_T1L: Tensor


def make_rotation(positions_T: Tensor, head_size: int, *, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles position · theta^(−2i/K) for pair i, of positions [T] or [B, T]; `dtype` is at least fp32."""
    pairs_L = torch.arange(0, head_size, 2, device=positions_T.device).to(dtype)
    frequencies_L = 1.0 / theta ** (pairs_L / head_size)
    angles_T1L = (positions_T.to(dtype)[..., None] * frequencies_L)[..., None, :]
    return Rotation(angles_T1L.cos(), angles_T1L.sin())


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn every pair of every head by its position's angle; the products are formed in the table's dtype."""
    cos_T1L, sin_T1L = rotation
    a_BTHL, b_BTHL = x_BTHK.chunk(2, dim=-1)
    turned_BTHK = torch.cat((a_BTHL * cos_T1L - b_BTHL * sin_T1L, b_BTHL * cos_T1L + a_BTHL * sin_T1L), dim=-1)
    return turned_BTHK.to(x_BTHK.dtype)
