"""One decoder block and its tensors: each is read from the disk once, however often it is used."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.layout import Layout
from quantize.model.shell import Shell, fill
from quantize.model.sites import Matrix, Site


class Block:
    """A decoder block of a streamed model.

    Attributes:
        index: its number.
        sites: its inputs and what reads them.
        matrices: the matrices of the files that it multiplies with, by name.
    """

    def __init__(
        self, checkpoint: Checkpoint, layout: Layout, shell: Shell, index: int, sites: list[Site],
        matrices: list[Matrix],
    ) -> None:  # fmt: skip
        self.checkpoint, self.layout, self.shell = checkpoint, layout, shell
        self.index, self.sites = index, sites
        self.matrices: dict[str, Matrix] = {m.name: m for m in matrices}
        self.prefix = f"{shell.stack}.{index}."
        self._tensors: dict[str, Tensor] = {}

    def read(self, tensor: str) -> Tensor:
        """A tensor of the files, on the CPU, in its own dtype; kept as long as the block."""
        if tensor not in self._tensors:
            self._tensors[tensor] = self.checkpoint.read(tensor)
        return self._tensors[tensor]

    def weight(self, name: str) -> Tensor:
        """A matrix of the files, float32 ``[out, in]``, on the device."""
        matrix = self.matrices[name]
        value = self.read(matrix.tensor)
        if matrix.slice is not None:
            value = value[matrix.slice]
        value = value.T if matrix.transposed else value
        return value.to(self.shell.device, torch.float32).contiguous()

    def module(
        self, replace: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The block as transformers' class, its weights on the device.

        Args:
            replace: matrix -> weight ``[out, in]`` to use in place of the files'.
            dtype: of the weights (None: the model's).
        """
        shell = self.shell
        layer = shell.make_block(self.index)
        names = list(layer.state_dict())
        fill(
            layer, names, lambda wanted: self.layout.values(wanted, self.read), shell.device,
            dtype or shell.dtype, self.prefix,
        )  # fmt: skip
        self.put(layer, replace or {})
        return layer

    @torch.no_grad()
    def put(self, layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give matrices of a module of this block other weights (matrix -> ``[out, in]``).

        Raises:
            PT2Error: the block has no such matrix.
        """
        for name, weight in weights.items():
            if name not in self.matrices:
                raise PT2Error(f"{name} is no matrix of decoder block {self.index} of the model")
            for part in self.matrices[name].parts:
                place = layer.get_parameter(part.param.removeprefix(self.prefix)).data
                if part.param_slice is not None:
                    place = place[part.param_slice]
                place = place.T if part.param_transposed else place
                if part.whole(weight.shape[0], place.shape[0]):
                    place.copy_(weight.to(place.device, place.dtype))
                    continue
                value = weight[part.rows.to(weight.device)].to(place.device, place.dtype)
                place[part.param_rows.to(place.device)] = value
