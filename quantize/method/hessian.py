"""Second moments of a linear's inputs, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pt2_core.errors import PT2Error

# Column panels when multiplying: only the panels on and above the diagonal are computed.
PANELS = 4
PANEL_MIN = 256
# Tokens a column from which on an expert's own Hessian counts alone.
ENOUGH = 4


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


class ExpertMoments:
    """x x^T of experts' inputs, each from the tokens that were routed to it.

    Attributes:
        own: expert -> its moments.
        common: those of all experts' inputs together; None where they were not asked for.
    """

    def __init__(self, experts: Iterable[int], common: bool) -> None:
        self.own = {e: InputMoments() for e in experts}
        self.common = InputMoments() if common else None

    def add(self, inputs: Mapping[int, Tensor]) -> None:
        """Add a batch: expert -> its tokens, ``[tokens, cols]``."""
        for expert, x in inputs.items():
            if x.numel() == 0:
                continue
            if expert in self.own:
                self.own[expert].add(x)
            if self.common is not None:
                self.common.add(x)


def blend(own: InputMoments, common: Tensor, where: str) -> tuple[Tensor, float]:
    """An expert's Hessian: its own, with some of the layer's common one where its tokens are few.

    With n tokens over c columns the share of the common one falls in a straight line from 1 at
    n = 0 to 0 at n = ``ENOUGH`` c: below one token a column the expert's own is not of full rank.

    Args:
        common: float64 ``[cols, cols]``, the mean over all experts' inputs.
        where: names the input.

    Returns:
        (the Hessian, float64 ``[cols, cols]``; the share of the common one)
    """
    share = max(0.0, 1.0 - own.count / (ENOUGH * common.shape[0]))
    if own.count == 0:
        return common, 1.0
    mean = own.mean(where)
    return (torch.lerp(mean, common, share), share) if share else (mean, 0.0)


def mean_square(w: Tensor, hessian: Tensor) -> float:
    """The mean over tokens of ``|W x|^2``: the scale of E_x."""
    return float(((w @ hessian.to(w.dtype)) * w).sum(dtype=torch.float64))
