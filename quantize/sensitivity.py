"""What each linear's quantisation costs, as pt2-export's mixed precision wants to know it.

The file ``sensitivity.safetensors`` in an artifact's folder, written by :mod:`quantize.measure`.
Per ternary linear M it holds ``M.energy``, float32 ``[cols]``: the mean square of each input,
columns in the source model's order. Its metadata hold the figures (JSON), and the digest of the
artifact that they were taken from: those of another one are refused. Plain NumPy.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pt2_core.commands import command
from quantize.artifact import Artifact
from quantize.common import PT2Error, atomic_path

FILE = "sensitivity.safetensors"
FORMAT = "pt2-sensitivity-1"
RECORD = "pt2"


@dataclass(frozen=True)
class Linear:
    """One ternary linear in the otherwise ternary model.

    Attributes:
        gain: by how much the model's KL divergence from full precision falls (nats per token) when
            this linear alone gets its original weights back. May be negative.
        error: mean square of what its ternary weights do to its outputs, summed over them.
        energy: float32 ``[cols]``, the mean square of each input.
    """

    gain: float
    error: float
    energy: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sensitivity:
    """All figures of one artifact.

    Attributes:
        tokens: that the figures were taken from.
        kl: of the ternary model from full precision, nats per token.
        linears: module name -> figures.
        tables: ``embedding`` and ``head`` (one entry, ``embedding``, where they are one tensor) ->
            rise of the KL divergence per relative squared error of the table's weights.
    """

    tokens: int
    kl: float
    linears: dict[str, Linear]
    tables: dict[str, float]


def write(artifact: Artifact, value: Sensitivity) -> Path:
    """Write the file into the artifact's folder, and return its path."""
    path = artifact.path / FILE
    figures = {
        **asdict(value),
        "linears": {n: {"gain": v.gain, "error": v.error} for n, v in value.linears.items()},
    }
    # One entry: safetensors writes several in a random order.
    record = {"format": FORMAT, "artifact": digest(artifact), "figures": figures}
    metadata = {RECORD: json.dumps(record, sort_keys=True)}
    tensors = {f"{n}.energy": np.ascontiguousarray(v.energy) for n, v in value.linears.items()}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata=metadata)
    return path


def read(artifact: Artifact) -> Sensitivity:
    """Read an artifact's file.

    Raises:
        PT2Error: there is none, it is damaged, or it was measured on another state of the artifact.
    """
    path = artifact.path / FILE
    if not path.is_file():
        raise PT2Error(f"{artifact.path} has no {FILE}; {_how(artifact)}")
    try:
        with safe_open(path, framework="numpy") as f:
            record = json.loads((f.metadata() or {})[RECORD])
            energies = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        figures = record["figures"]
        linears = {
            name: Linear(float(v["gain"]), float(v["error"]), energies[f"{name}.energy"])
            for name, v in figures["linears"].items()
        }
        result = Sensitivity(
            int(figures["tokens"]), float(figures["kl"]), linears,
            {k: float(v) for k, v in figures["tables"].items()},
        )  # fmt: skip
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise PT2Error(f"{path} is damaged; {_how(artifact)}") from e
    if record.get("format") != FORMAT or record.get("artifact") != digest(artifact):
        raise PT2Error(f"{path} is not of this state of the artifact; {_how(artifact)}")
    return result


def _how(artifact: Artifact) -> str:
    words = ("python", "-m", "quantize.measure", artifact.path, "--calibration", "TEXT")
    return f"measure it: {command(*words)}"


def digest(artifact: Artifact) -> str:
    """What stands for the artifact's content: a hash of the checksums of its files."""
    files: dict[str, Any] = artifact.manifest["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
