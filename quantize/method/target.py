"""What the quantised weights of a site are to come close to, where it is not the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.method.gptq import damp


def target(
    weight: Tensor, hessian: Tensor, damping: float,
    inputs: tuple[float, Tensor | None], stream: tuple[float, Tensor | None],
) -> Tensor | None:  # fmt: skip
    """The least-squares match of the full-precision model's outputs, or a share of the way there.

    Args:
        weight: float32 ``[rows, cols]``.
        hessian: float64 ``[cols, cols]``, the mean of x x^T.
        damping: share of its mean diagonal that is added to it.
        inputs: (share, the mean of (x_full - x) x^T, float64 ``[cols, cols]``): how far the inputs'
            error is made up for.
        stream: (share, the mean of (s_full - s) x^T, float64 ``[rows, cols]``): the same for the
            residual stream s that the outputs are added to.

    Returns:
        float32 ``[rows, cols]``; None for the weights themselves.
    """
    if inputs[1] is None and stream[1] is None:
        return None
    shift = torch.zeros_like(weight, dtype=torch.float64)
    if inputs[1] is not None:
        shift += inputs[0] * (weight.double() @ inputs[1])
    if stream[1] is not None:
        shift += stream[0] * stream[1]
    damped, _ = damp(hessian, damping)
    move = torch.cholesky_solve(shift.T, torch.linalg.cholesky(damped)).T
    return weight + move.float()
