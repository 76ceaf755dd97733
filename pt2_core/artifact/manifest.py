"""What a manifest must look like: checked once, when it is read, so that nobody meets it later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.model.fold_edges import FOLD, split_expert
from pt2_core.schema import (
    anything,
    boolean,
    integer,
    mapping,
    number,
    optional,
    record,
    sequence,
    text,
    validate,
)

SHA256 = r"[0-9a-f]{64}"
FILE_NAME = r"(?!block-)[a-z][a-z-]*\.safetensors|block-\d{5}\.safetensors"
# The name of a tensor in the files without its ``.weight``; of a tensor of three dimensions each
# expert is a matrix of its own.
MATRIX_NAME = r"[\w.-]+(\[\d{1,6}\])?"
STAGES = ("init", "itf", "aga", "reround", "blockwise", "final")  # as they follow in time
MEND = "quantise again, or copy the artifact again"

_SIZE = integer(1, (1 << 31) - 1)
_ERRORS = mapping(number(0), "|".join(STAGES))
HELD = record({k: number() for k in ("kl", "same_top", "perplexity", "teacher_perplexity")})
_MATRIX = record(
    {"rows": _SIZE, "cols": _SIZE},
    {"block_size": _SIZE, "levels": integer(3, 4), "order": text(), "E_w": _ERRORS, "E_x": _ERRORS,
     "norm_w": number(0), "norm_x": number(0),
     # Where the matrix is: the tensor of the files, and whether that holds [in, out].
     "tensor": text(), "transposed": boolean,
     # Of an expert: its calibration tokens, the share of the layer's common Hessian in its own.
     "tokens": integer(0), "common": number(0)},
)  # fmt: skip
_MODEL = record(
    {"fingerprint": text()},
    {"architecture": text(), "model_type": optional(text()),
     "tensors": mapping(sequence(integer(0), longest=8))},
)  # fmt: skip
_MANIFEST = record(
    {
        "complete": boolean,
        "files": mapping(text(SHA256), FILE_NAME),
        "kept": mapping(text()),
        "matrices": mapping(_MATRIX, MATRIX_NAME),
        "model": _MODEL,
        "settings": record({"block_size": _SIZE}),
        "versions": mapping(anything),
        "calibration": mapping(anything),
    },
    {"activations": mapping(text(), r"\d{1,6}"),
     "fold": optional(FOLD),
     "proof": mapping(anything),
     "refinement": record({"before": HELD, "after": HELD})},
)  # fmt: skip


def check_manifest(value: Any, file: Path) -> None:
    """Check every entry of a manifest that a reader relies on.

    Raises:
        PT2Error: with the place of the first entry that is missing or wrong.
    """
    validate(value, _MANIFEST, file, MEND)
    blocks = sorted(name for name in value["files"] if name.startswith("block-"))
    if blocks != [f"block-{i:05d}.safetensors" for i in range(len(blocks))]:
        raise PT2Error(f"{file}: 'files' names {blocks[-1]} but not every block before it; {MEND}")
    if value["matrices"] and not blocks:
        lost = next(iter(value["matrices"]))
        raise PT2Error(f"{file}: 'matrices' has {lost}, and there is no block's file; {MEND}")
    cols = {name: m["cols"] % m.get("block_size", 1) for name, m in value["matrices"].items()}
    if bad := next((name for name, rest in cols.items() if rest), None):
        raise PT2Error(f"{file}: the columns of {bad} are no multiple of its block_size; {MEND}")


def check_errors(value: dict[str, Any], file: Path) -> None:
    """Check that the errors are there that reports and summaries are made of.

    Raises:
        PT2Error: a matrix has none, or others than the rest.
    """
    matrices = value["matrices"]
    wanted = {k: set(next(iter(matrices.values())).get(k, ())) for k in ("E_w", "E_x")}
    for name, m in matrices.items():
        found = {k: set(m.get(k, ())) for k in wanted}
        if found != wanted or not all(found.values()) or not {"norm_w", "norm_x"} <= m.keys():
            raise PT2Error(f"{file}: {name} lacks errors of some stages, or their norms; {MEND}")


def tensor_of(name: str, entry: Mapping[str, Any]) -> tuple[str, int | None]:
    """The full name of the checkpoint's tensor that a matrix is of, and which expert it is.

    Args:
        entry: the manifest's entry of the matrix.
    """
    whole, expert = split_expert(name)
    return str(entry.get("tensor", f"{whole}.weight")), expert


def block_of(name: str) -> int:
    """The first number in a matrix's name, by which tables for people are sorted.

    Which file it is in only the files say (:meth:`pt2_core.artifact.folder.Artifact.homes`).
    """
    numbers = (int(part) for part in name.split(".") if part.isdecimal())
    return next(numbers, 0)


def kind_of(name: str) -> str:
    """The kind of linear that a matrix is, as tables and figures group them.

    >>> kind_of("model.layers.0.mlp.experts.down_proj[5]"), kind_of("model.layers.0.mlp.up_proj")
    ('down_proj', 'up_proj')
    """
    return split_expert(name)[0].rpartition(".")[2]
