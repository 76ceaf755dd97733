"""The plain path: transformers' checkpoint to an F32 file, and its predictions in our llama.cpp.

What fails here has nothing to do with ternary weights: the tiny config, the converter or llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from export.converter import Options, convert_whole
from export.proof import Verdict, check_file
from export.prove import known_gaps
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api
from tests.zoo.models import fields, load, proof_of, write_model

MAX_KL = 1e-3


def plain(folder: Path, name: str, kind: str) -> Verdict:
    """Make a class's model in ``folder``, convert it as it is, and compare the predictions."""
    model = write_model(folder / "model", name, kind)
    proof = proof_of(model, load(model))
    file = folder / "plain.gguf"
    convert_whole(
        api.source_dir(), Checkpoint.open(model), file, Options(), folder / "log", outtype="f32"
    )
    return check_file(file, proof, api.require_build(), gaps=known_gaps(proof, fields(file)))

