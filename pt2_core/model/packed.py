"""Checkpoints that hold weights in 4 or 8 bits, read as the 16-bit values that these stand for.

Two kinds are published as models' own weights, not as something made of 16-bit ones: MXFP4
(gpt-oss) and FP8 with a scale for each tile (DeepSeek). Whatever is made of such a checkpoint sees
bfloat16 tensors under the names that transformers' class has for them. Free of torch until one is
read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2_core.errors import PT2Error
from pt2_core.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MXFP4, FP8 = "mxfp4", "fp8"
_BLOCKS, _SCALES, _SCALE = "_blocks", "_scales", ".weight_scale_inv"
# The 16 values of a 4-bit float: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Packed:
    """A tensor that is in the files in another form.

    Attributes:
        kind: :data:`MXFP4` or :data:`FP8`.
        weight, scale: the file's tensors that it is made of.
        shape: its own.
        tile: FP8: rows and columns that share a scale.
    """

    kind: str
    weight: str
    scale: str
    shape: tuple[int, ...]
    tile: tuple[int, int] = (1, 1)

    @property
    def info(self) -> TensorInfo:
        """As if it stood in a file."""
        return TensorInfo("BF16", self.shape, 0, 0)

    def read(self, raw: Callable[[str], Tensor]) -> Tensor:
        """Its values, bfloat16.

        Args:
            raw: gives a tensor of the files as it is stored.
        """
        weight, scale = raw(self.weight), raw(self.scale)
        if self.kind == MXFP4:
            return from_mxfp4(weight, scale)
        return from_fp8(weight, scale, self.tile)


def packed_tensors(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Packed]:
    """The tensors that are stored in 4 or 8 bits, by the names that they have in 16.

    Args:
        config: ``config.json``, whose ``quantization_config`` says how.
        tensors: the headers' entries.

    Raises:
        PT2Error: a weight whose scales are missing or of another shape.
    """
    quantised = config.get("quantization_config")
    kind = quantised.get("quant_method") if isinstance(quantised, dict) else None
    found: dict[str, Packed] = {}
    for name, info in tensors.items():
        if kind == MXFP4 and name.endswith(_BLOCKS):
            own = name.removesuffix(_BLOCKS)
            found[own] = _mxfp4(path, name, own + _SCALES, tensors)
        elif kind == FP8 and info.dtype == "F8_E4M3" and name.endswith(".weight"):
            scale = name.removesuffix(".weight") + _SCALE
            found[name] = _fp8(path, name, scale, tensors, quantised)
    return found


def _mxfp4(path: Path, weight: str, scale: str, tensors: Mapping[str, TensorInfo]) -> Packed:
    shape = tuple(tensors[weight].shape)
    fits = scale in tensors and tuple(tensors[scale].shape) == shape[:-1]
    kinds = {tensors[n].dtype for n in (weight, scale) if n in tensors}
    if len(shape) != 4 or shape[-1] != 16 or not fits or kinds != {"U8"}:
        raise PT2Error(f"{path}: {weight} and {scale} are no MXFP4 weights; download them again")
    return Packed(MXFP4, weight, scale, (shape[0], 32 * shape[2], shape[1]))


def _fp8(
    path: Path, weight: str, scale: str, tensors: Mapping[str, TensorInfo], how: Any
) -> Packed:
    shape = tuple(tensors[weight].shape)
    tile = how.get("weight_block_size") or shape
    fits = len(shape) == len(tile) == 2 and all(type(n) is int and n > 0 for n in tile)
    if fits and scale in tensors:
        wanted = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
        fits = tuple(tensors[scale].shape) in (wanted, ()) and tensors[scale].dtype in (
            "F32", "BF16", "F16",
        )  # fmt: skip
    if not fits or scale not in tensors:
        raise PT2Error(
            f"{path}: {weight} is in FP8, and {scale} is missing or does not fit its shape and "
            "weight_block_size; download the model again"
        )
    return Packed(FP8, weight, scale, shape, (tile[0], tile[1]))


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 ``[experts, cols, rows]``, as transformers' class holds it.

    Args:
        blocks: uint8 ``[experts, rows, cols/32, 16]``, two values a byte, the lower half first.
        scales: uint8 ``[experts, rows, cols/32]``, exponents of 2, 127 too large.
    """
    import torch

    table = torch.tensor([*_FP4, *(-v for v in _FP4)], dtype=torch.bfloat16)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    values = torch.ldexp(table[codes], (scales.int() - 127)[..., None])
    return values.to(torch.bfloat16).flatten(-2).transpose(1, 2).contiguous()


def from_fp8(weight: Tensor, scale: Tensor, tile: tuple[int, int]) -> Tensor:
    """bfloat16 ``[rows, cols]``.

    Args:
        weight: float8 ``[rows, cols]``.
        scale: what a tile of the weight is multiplied by, ``[rows / tile, cols / tile]`` rounded
            up; or one for all.
        tile: rows and columns of a tile; those at the end may be smaller.
    """
    import torch

    wide = scale.float()
    if wide.dim() == 2:
        wide = wide.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
        wide = wide[: weight.shape[0], : weight.shape[1]]
    return (weight.float() * wide).to(torch.bfloat16)
