"""Types of unmodified llama.cpp that hold a grid of the quantiser's exactly: Q2_0 and TQ2_0.

Both keep a half d and two bits of code for every weight ``d * (code - 1)``. The bytes are those of
``block_q2_0`` and ``block_tq2_0`` in ggml-common.h. NumPy is imported where it is used, as in
:mod:`pt2_core.formats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    U8 = NDArray[np.uint8]
    F16 = NDArray[np.float16]


@dataclass(frozen=True)
class UpstreamType:
    """One of them.

    Attributes:
        id: in ``enum ggml_type``; file_type: in ``enum llama_ftype``.
        block: weights that share a d; levels: how many codes the quantiser uses.
        lanes: weights between two that share a byte: weight ``e`` of a run of ``4 * lanes`` is in
            bits ``2 * (e // lanes)`` of byte ``e % lanes``.
        scale_first: whether d stands before the codes.
    """

    id: int
    file_type: int
    block: int
    levels: int
    lanes: int
    scale_first: bool

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return 2 + self.block // 4

    def pack(self, codes: U8, d: F16) -> U8:
        """Encode codes ``[rows, cols]`` and d ``[rows, cols / block]``; ``[rows, bytes]``."""
        import numpy as np

        rows = codes.shape[0]
        runs = codes.reshape(-1, 4, self.lanes)
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        qs = np.bitwise_or.reduce(runs << shifts, axis=1).reshape(-1, self.block // 4)
        scale = np.ascontiguousarray(d.reshape(-1, 1).astype("<f2")).view(np.uint8)
        parts = (scale, qs) if self.scale_first else (qs, scale)
        return np.concatenate(parts, axis=1).reshape(rows, -1)


TYPES = {
    "q2_0": UpstreamType(42, 41, 64, 4, 1, scale_first=True),
    "tq2_0": UpstreamType(35, 37, 256, 3, 32, scale_first=False),
}


def grid_of(manifest: Mapping[str, Any]) -> str:
    """The grid that an artifact was quantised to: ``pt2``, or a name in :data:`TYPES`."""
    return str(manifest["settings"].get("grid", "pt2"))
