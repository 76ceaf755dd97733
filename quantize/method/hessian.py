"""Second moments of a linear's inputs, gathered batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from pt2_core.errors import PT2Error

# Column panels when multiplying: only the panels on and above the diagonal are computed.
PANELS = 4
PANEL_MIN = 256


class InputMoments:
    """The sum of x x^T over tokens, float64 ``[cols, cols]`` (eq. 12's C; GPTQ's Hessian)."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None  # only the upper panels are filled

    def add(self, x: Tensor) -> None:
        """Add the tokens of ``x``, ``[..., cols]`` in any floating dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        cols = x.shape[1]
        if self._sum is None:
            self._sum = torch.zeros(cols, cols, dtype=torch.float64, device=x.device)
        self.count += x.shape[0]
        width = max(PANEL_MIN, -(-cols // PANELS))
        for start in range(0, cols, width):
            stop = min(start + width, cols)
            # The product is full float32 (no TF32); across batches the sum is float64.
            self._sum[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    def mean(self, where: str) -> Tensor:
        """The mean of x x^T, float64 ``[cols, cols]``, symmetric.

        Raises:
            PT2Error: NaN or Inf in the inputs; ``where`` names them.
        """
        if self._sum is None:
            raise PT2Error(f"{where}: no calibration tokens reached it")
        upper = self._sum.triu() / self.count
        mean = upper + upper.triu(1).T
        if not bool(mean.isfinite().all()):
            raise PT2Error(
                f"NaN or Inf in the activations ({where}): use --dtype float32 or bfloat16, "
                "or check the model"
            )
        return mean


class CrossMoments:
    """The sum of d x^T over tokens, float64 ``[rows, cols]``: how d goes along with x."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def add(self, d: Tensor, x: Tensor) -> None:
        """Add tokens: ``d`` ``[..., rows]`` beside ``x`` ``[..., cols]``."""
        d, x = (v.detach().reshape(-1, v.shape[-1]).float() for v in (d, x))
        product = (d.T @ x).double()
        self.count += x.shape[0]
        self._sum = product if self._sum is None else self._sum.add_(product)

    def mean(self) -> Tensor | None:
        """The mean of d x^T; None if nothing was added."""
        return None if self._sum is None else self._sum / self.count


class SiteMoments:
    """What is gathered of a site's inputs x over the calibration tokens.

    Attributes:
        inputs: x x^T.
        shift: (x in the full-precision model - x) x^T.
        stream: (the residual stream in the full-precision model - the stream) x^T.
    """

    def __init__(self) -> None:
        self.inputs = InputMoments()
        self.shift = CrossMoments()
        self.stream = CrossMoments()

    def add(
        self, x: Tensor, x_full: Tensor, stream: Tensor | None, stream_full: Tensor | None,
        shift: bool, streams: bool,
    ) -> None:  # fmt: skip
        """Add a batch, ``[n, len, ...]`` each; ``shift`` and ``streams`` say what is wanted."""
        self.inputs.add(x)
        if shift:
            self.shift.add(x_full.float() - x.float(), x)
        if streams and stream is not None and stream_full is not None:
            self.stream.add(stream_full.float() - stream.float(), x)


def mean_square(w: Tensor, hessian: Tensor) -> float:
    """The mean over tokens of ``|W x|^2``: the scale of E_x."""
    return float(((w @ hessian.to(w.dtype)) * w).sum(dtype=torch.float64))
