"""What a refinement stores: a snapshot of the student, and the artifact made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pt2_core.artifact.folder import Artifact, ArtifactWriter
from pt2_core.artifact.matrix import TernaryMatrix
from pt2_core.artifact.proof import Proof
from pt2_core.model.checkpoint import Checkpoint
from quantize.method.ternary import Grid, positive_alpha
from quantize.model.latent import round_codes
from quantize.model.student import Network, ScaledNorm, TernaryLinear
from quantize.refinement.distill import Held


def pack_codes(codes: Tensor) -> Tensor:
    """:func:`pt2_core.artifact.matrix.pack_ternary` where the codes are: uint8 ``[rows, cols /
    4]``.

    Args:
        codes: values of {-1, 0, 1, 2}, ``[rows, cols]``, of any dtype.
    """
    quads = (codes + 1).to(torch.uint8).view(codes.shape[0], -1, 4)
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


@torch.no_grad()
def snapshot(student: Network) -> dict[str, Tensor]:
    """What is stored of a student: ``M.ternary``, ``M.alpha``, ``M.mu``, and trained norms.

    As in the artifact, on the CPU: packed uint8, float16, float16; norms float32 by their names in
    the checkpoint. Blocks of negative alpha are counted from the other end.
    """
    result: dict[str, Tensor] = {}
    for name, layer in student.modules(TernaryLinear):
        alpha, mu = layer.grid()
        z = layer.latent.z if layer.latent is not None else layer.codes()
        codes = round_codes(z, layer.levels).view(alpha.numel(), -1)
        grid, codes = positive_alpha(Grid(alpha.flatten(), mu.flatten()), codes, layer.levels)
        result[f"{name}.ternary"] = pack_codes(codes.view(z.shape)).cpu()
        result[f"{name}.alpha"] = grid.alpha.view(alpha.shape).half().cpu()
        result[f"{name}.mu"] = grid.mu.view(alpha.shape).half().cpu()
    for name, norm in student.modules(ScaledNorm):
        if norm.c.requires_grad:
            result[f"{name}.weight"] = norm.weight().cpu()
    return result


def write_refined(
    out: Path, source: Artifact, stored: dict[str, Tensor], identity: dict[str, Any], before: Held,
    after: Held, prove: Callable[[Artifact], Proof | str],
) -> None:  # fmt: skip
    """Write the source artifact with a snapshot's values in it.

    Args:
        stored: of :func:`snapshot`, and tables by their names.
        identity: ``settings``, ``source``, ``tokens_sha256``, ``versions`` of the run.
        before, after: on the held-out windows.
        prove: makes the proof of what has been written, or says why there is none.
    """
    keep = ("model", "versions", "calibration", "kept")
    manifest = {k: source.manifest[k] for k in keep}
    restored = [n for n in source.matrices if f"{n}.ternary" not in stored]
    manifest["kept"] = manifest["kept"] | dict.fromkeys(restored, "restored")
    manifest["settings"] = {**source.manifest["settings"], "refine": identity["settings"]}
    manifest["refinement"] = {
        **{k: identity[k] for k in ("source", "tokens_sha256", "versions")},
        "before": vars(before), "after": vars(after),
    }  # fmt: skip
    writer = ArtifactWriter.create(out, manifest)
    writer.write_global(source.residual_perm)
    used: set[str] = set()
    for index in range(source.n_blocks):
        matrices = []
        for name, m in source.block(index).items():
            if name in restored:
                continue
            parts = {p: stored[f"{name}.{p}"].numpy() for p in ("ternary", "alpha", "mu")}
            used |= {f"{name}.{p}" for p in parts}
            matrices.append(TernaryMatrix(name, **parts, perm=m.perm, levels=m.levels))
        records = {m.name: source.matrices[m.name] for m in matrices}
        writer.write_block(index, matrices, records)
    others = {k: v.numpy() for k, v in stored.items() if k not in used}
    replaced = {**source.replaced(), **others}
    if replaced:
        writer.write_replaced(replaced)
    store_proof(writer, prove(Artifact.open(out, allow_incomplete=True)))


def store_proof(writer: ArtifactWriter, proof: Proof | str) -> None:
    """Write a proof, or why there is none; the artifact is complete then."""
    if isinstance(proof, Proof):
        writer.write_proof(proof.arrays(), proof.record())
    else:
        writer.manifest["proof"] = {"left_out": proof}
    writer.finish()


def result_tensors(
    source: Artifact, checkpoint: Checkpoint, restored: set[str], found: Iterable[str]
) -> dict[str, Tensor]:
    """Tensors of the names, shapes and dtypes that the state of a run has that was trained out.

    Args:
        restored: the linears that get their original weights back, and are not stored.
        found: the state's names. Which norms and tables it has is not asked, only whether the
            model has them.
    """
    wanted = {}
    for index in range(source.n_blocks):
        for name, m in source.block(index).items():
            if name not in restored:
                for part in ("ternary", "alpha", "mu"):
                    wanted[f"snapshot.{name}.{part}"] = torch.from_numpy(getattr(m, part))
    for key in found:
        name = key.removeprefix("snapshot.")
        if key not in wanted and name in checkpoint.tensors and key != name:
            wanted[key] = torch.empty(checkpoint.info(name).shape, device="meta")
    return wanted


def changed_codes(source: Artifact, stored: dict[str, Tensor]) -> float:
    """Share of the codes that differ from the source's."""
    different = total = 0
    for index in range(source.n_blocks):
        for name, m in source.block(index).items():
            if f"{name}.ternary" not in stored:
                continue
            bits = m.ternary ^ stored[f"{name}.ternary"].numpy()
            different += sum(int(np.count_nonzero(bits >> s & 3)) for s in (0, 2, 4, 6))
            total += m.rows * m.cols
    return different / total
