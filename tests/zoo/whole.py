"""The whole path of one class: quantised, exported as each type, run, compared twice.

pt2-export holds every file against the artifact's proof, which the quantiser's streamed model made.
Here the predictions are compared once more, with those of transformers' own class after its file
was written anew with the dequantised weights: nothing of the quantiser or the exporter is in that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.proof import check_file
from export.prove import known_gaps
from pt2_core import formats
from pt2_core.artifact.folder import Artifact
from pt2_llama import api
from tests.zoo.kept import keep
from tests.zoo.models import WrongFile, fields, load, proof_of, write_model

TYPES = (*formats.TYPES, "q2_k")
# Q2_K rounds the scales, which costs a right file this much at most.
MAX_KL = {"q2_k": 0.1}
_EXPERT = re.compile(r"(.*)\[(\d+)\]")


def whole(folder: Path, name: str, kind: str, keep_in: Path | None = None) -> dict[str, Any]:
    """Run one class through everything.

    Args:
        folder: for its model, artifact and files.
        name, kind: the class, and transformers' model type.
        keep_in: where to keep the file of the first type, with what it has to predict.

    Returns:
        ``ternary`` and ``kept``: how many matrices became ternary and how many did not; per type
        ``kl``, ``same``, ``proof`` (of pt2-export) and ``fallbacks``.

    Raises:
        PT2Error: whatever the quantiser or the exporter refuses.
        WrongFile: llama.cpp predicts something else than transformers.
    """
    from export import ExportConfig, export_gguf
    from quantize.pipeline import ternarize

    model = write_model(folder / "model", name, kind)
    artifact_dir = folder / "artifact"
    ternarize(model, artifact_dir, quantiser())
    artifact = Artifact.open(artifact_dir)
    result: dict[str, Any] = {"ternary": len(artifact.matrices), "kept": len(artifact.kept)}
    expected = proof_of(model, load(dequantised(model, artifact, folder / "dequantised")))
    for type_ in TYPES:
        file = folder / f"{type_}.gguf"
        report = export_gguf(
            artifact_dir, file,
            ExportConfig(type=type_, embedding_type="f16", output_type="f16", proof_tokens=256),
        )  # fmt: skip
        assert report.proof is not None
        verdict = check_file(
            file, expected, api.require_build(), gaps=known_gaps(expected, fields(file))
        )
        found = verdict.difference
        if keep_in is not None and type_ == TYPES[0]:
            keep(file, expected, known_gaps(expected, fields(file)), keep_in, name)
        result[type_] = {
            "kl": found.kl, "same": found.same_top, "proof": report.proof.difference.kl,
            "fallbacks": len(report.fallbacks),
        }  # fmt: skip
        tokens_differ = verdict.problem is not None and "other tokens" in verdict.problem
        limit = MAX_KL.get(type_)
        if tokens_differ or (verdict.problem and (limit is None or found.kl > limit)):
            raise WrongFile(f"{type_}: {verdict.problem}")
    return result


def quantiser() -> Any:
    """The fast recipe cut short, on next to no calibration: here only what is written counts."""
    from quantize.config import Config

    return Config(
        calibration="bundled:calibration", samples=4, seqlen=96, device="cpu", threads=1,
        proof_tokens=256, itf_steps=3, reround=0,
    )  # fmt: skip


def dequantised(model: Path, artifact: Artifact, folder: Path) -> Path:
    """Write a model's folder anew with ``alpha * T + mu`` in place of what became ternary.

    Args:
        model: the source's folder, with one file of weights.
        folder: is made.
    """
    folder.mkdir()
    weights = {k: v.float() for k, v in load_file(model / "model.safetensors").items()}
    for block in range(artifact.n_blocks):
        for name, matrix in artifact.block(block).items():
            values = torch.from_numpy(matrix.dequantize())
            _put(weights, name, values, artifact.manifest["matrices"][name])
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _put(weights: dict[str, Tensor], name: str, values: Tensor, entry: Mapping[str, Any]) -> None:
    """Put a matrix ``[rows, cols]`` where its name and its entry in the manifest say."""
    expert = _EXPERT.fullmatch(name)
    owner = expert[1] if expert else name
    tensor = weights[str(entry.get("tensor") or (owner if owner in weights else f"{owner}.weight"))]
    place = tensor[int(expert[2])] if expert else tensor
    values = values.T if entry.get("transposed") else values
    assert place.shape == values.shape, f"{name}: {tuple(place.shape)}, {tuple(values.shape)}"
    place.copy_(values)
