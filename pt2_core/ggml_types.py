"""The ggml tensor types this tool can name, and how many bytes a block of each takes.

Ids and block sizes are those of `enum ggml_type` and the block structs of llama.cpp
(ggml/include/ggml.h, ggml/src/ggml-common.h at 0c1e57098) plus the types of this project
(:mod:`pt2_core.formats`). The table is our own rather than gguf-py's because that package
refuses a file with a type it does not know, which is the very file that has to be measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from pt2_core import formats


@dataclass(frozen=True)
class GGMLType:
    """One tensor type: `block` elements are stored in `nbytes` bytes."""

    id: int
    name: str
    block: int
    nbytes: int

    @property
    def bpw(self) -> float:
        """Bits per weight of the bare blocks."""
        return 8 * self.nbytes / self.block

    def size(self, elements: int) -> int:
        """Bytes of `elements` values; a row must be a whole number of blocks."""
        return elements // self.block * self.nbytes


TYPES: dict[int, GGMLType] = {
    t[0]: GGMLType(*t)
    for t in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
        *((t.id, t.name, t.block, t.nbytes) for t in formats.TYPES.values()),
    )
}
BY_NAME: dict[str, GGMLType] = {t.name: t for t in TYPES.values()}

# `general.file_type` of a file made mostly of one type (enum llama_ftype, include/llama.h).
FILE_TYPES: dict[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q4_K_M": 15,
    "IQ2_XXS": 19,
    "IQ1_S": 24,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "Q2_0": 41,
    **{t.name: t.file_type for t in formats.TYPES.values()},
}
