"""Codes that gradients can move: relaxations of rounding, and the latents' optimiser.

Every code t has a latent z, a real number in units of alpha; t is z rounded to {-1, 0, 1}, or with
four levels to {-1, 0, 1, 2}. Rounding has no gradient, so one is put in its place:

- ``ste`` (straight-through): dt/dz = 1.
- ``soft``: t is a smooth staircase with steps of width tau, and dt/dz is its true slope. Tau
  falls during the run, until the staircase is rounding itself.

z starts at the weight that was quantised, (w - mu) / alpha. Where the closed form chose another
code than the nearest, z is mirrored at the edge into that code's cell: the first step sees exactly
the model that was handed in, and weights near an edge are the first to move. (Clipped to the cell's
edge instead, one code in eight would flip at once in the first steps.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantize.method.ternary import LOWEST, clamp_levels_

EDGE = 0.01  # how far inside its cell a latent starts, at the least
# Latents stay within half a step of the outermost codes: further out they would take too long to
# come back.
HALF = 0.5
BETA_MEAN, BETA_SQUARE = 0.9, 0.98


def initial_latent(w: Tensor, t: Tensor, alpha: Tensor, mu: Tensor) -> Tensor:
    """Latents from the weights and their codes.

    Args:
        w: the original weights, float32 ``[rows, cols]``, columns in the quantised order.
        t: codes, ``[rows, cols]``.
        alpha, mu: float32 ``[rows, blocks]``.

    Returns:
        float32 ``[rows, cols]`` with ``round_codes(z) == t`` everywhere.
    """
    blocks = (*alpha.shape, -1)
    inverse = torch.where(alpha > 0, 1 / alpha, 0.0)[..., None]
    z = ((w.reshape(blocks) - mu[..., None]) * inverse).reshape(w.shape)
    t = t.to(z.dtype)
    low, high = t - HALF, t + HALF
    z = torch.where(z < low, (2 * low - z).minimum(t), z)
    z = torch.where(z > high, (2 * high - z).maximum(t), z)
    return torch.minimum(torch.maximum(z, low + EDGE), high - EDGE)


def round_codes(z: Tensor, levels: int = 3) -> Tensor:
    """The nearest code, in z's dtype."""
    return clamp_levels_(z.round(), levels)


def soft_codes(z: Tensor, tau: float, levels: int = 3) -> tuple[Tensor, Tensor]:
    """The smooth staircase and its slope: ``s((z - 1/2) / tau) + s((z + 1/2) / tau) - 1``, and with
    four levels one step more, at 3/2."""
    steps = [torch.sigmoid((z - edge) / tau) for edge in (0.5, -0.5, 1.5)[: levels - 1]]
    value, slope = steps[0], steps[0] * (1 - steps[0])
    for step in steps[1:]:
        value, slope = value + step, slope + step * (1 - step)
    return value + LOWEST, slope / tau


class Latent:
    """The latents of one matrix, their gradient, and Adam's moments.

    The gradient does not pass through autograd: the backward pass of the linear adds it here in
    bfloat16, so that a large model needs 4 + 2 + 2 bytes a weight, and the second moment is kept
    per block (one number for the columns that share an alpha), not per weight.

    Attributes:
        z: float32 ``[rows, cols]``.
        tau: the width of the soft staircase; 0 is rounding with a straight-through gradient.
        levels: how many codes there are.
    """

    def __init__(
        self, z: Tensor, blocks: int, *, per_weight: bool = False, levels: int = 3
    ) -> None:
        self.z = z
        self.levels = levels
        self.tau = 0.0
        rows, cols = z.shape
        self.shape = (rows, blocks, cols // blocks)
        self.grad = torch.zeros_like(z, dtype=torch.bfloat16)
        self.mean = torch.zeros_like(z, dtype=torch.bfloat16)
        size = self.shape if per_weight else (rows, blocks, 1)
        self.square = torch.zeros(size, dtype=torch.float32, device=z.device)

    def codes(self) -> Tensor:
        """What the forward pass multiplies with, float32 ``[rows, cols]``."""
        if self.tau:
            return soft_codes(self.z, self.tau, self.levels)[0]
        return round_codes(self.z, self.levels)

    def add_gradient(self, grad: Tensor) -> None:
        """Add dloss/dt, float ``[rows, cols]``, through the slope that stands for rounding's."""
        if self.tau:
            grad = grad * soft_codes(self.z, self.tau, self.levels)[1]
        self.grad.add_(grad)

    def step(self, lr: float, number: int) -> None:
        """One step of Adam, the ``number``-th from 1; clears the gradient.

        Args:
            lr: in units of alpha.
        """
        g = self.grad.float()
        mean = torch.lerp(g, self.mean.float(), BETA_MEAN)
        self.mean.copy_(mean)
        power = g.view(self.shape).square_()
        if self.square.shape[-1] == 1:
            power = power.mean(dim=-1, keepdim=True)
        self.square.lerp_(power, 1 - BETA_SQUARE)
        scale = (self.square / (1 - BETA_SQUARE**number)).sqrt_().add_(1e-20).reciprocal_()
        mean.view(self.shape).mul_(scale)
        self.z.sub_(mean, alpha=lr / (1 - BETA_MEAN**number))
        self.z.clamp_(LOWEST - HALF, LOWEST + self.levels - 1 + HALF)
        self.grad.zero_()
