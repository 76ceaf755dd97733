"""The plain path: transformers' checkpoint to an F32 file, and its predictions in our llama.cpp.

What fails here has nothing to do with ternary weights: the tiny config, the converter or llama.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.converter import Options, convert_whole
from export.proof import check_file
from export.prove import known_gaps
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api
from tests.zoo.models import WrongFile, fields, load, proof_of, write_model

MAX_KL = 3e-3


def plain_path(folder: Path, name: str, kind: str) -> dict[str, Any]:
    """Make a class's model in ``folder``, convert it as it is, and compare the predictions.

    Returns:
        ``kl`` and ``same`` (share of equal top tokens).

    Raises:
        PT2Error: the converter refuses the model, or llama.cpp the file.
        WrongFile: llama.cpp predicts something else.
    """
    model = write_model(folder / "model", name, kind)
    proof = proof_of(model, load(model))
    file = folder / "plain.gguf"
    convert_whole(
        api.source_dir(), Checkpoint.open(model), file, Options(), folder / "log", outtype="f32"
    )
    verdict = check_file(file, proof, api.require_build(), gaps=known_gaps(proof, fields(file)))
    found = verdict.difference
    if verdict.problem is not None or found.kl > MAX_KL:
        raise WrongFile(verdict.problem or f"KL {found.kl:.5f}, at most {MAX_KL}")
    return {"kl": found.kl, "same": found.same_top}
