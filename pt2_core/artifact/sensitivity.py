"""What each linear's quantisation costs, as pt2-export's mixed precision wants to know it.

The file ``sensitivity.safetensors`` in an artifact's folder, written by
:mod:`quantize.sensitivities`. Per ternary linear M it holds ``M.energy``, float32 ``[cols]``: the
mean square of each input, columns in the source model's order. Its metadata hold the figures
(JSON), the digest of the artifact that they were taken from, since those of another one are
refused, and a checksum of figures and energies. Plain NumPy.
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

from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.manifest import SHA256
from pt2_core.commands import command
from pt2_core.digest import sha256_content
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, parse_json
from pt2_core.safetensors_file import read_header
from pt2_core.schema import integer, mapping, number, text, validate
from pt2_core.schema import record as record_of

FILE = "sensitivity.safetensors"
FORMAT = "pt2-sensitivity-2"
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
    tensors = {f"{n}.energy": np.ascontiguousarray(v.energy) for n, v in value.linears.items()}
    record["sha256"] = sha256_content(record, tensors)
    metadata = {RECORD: json.dumps(record, sort_keys=True)}
    with atomic_path(path) as tmp:
        save_file(tensors, tmp, metadata=metadata)
    return path


def read(artifact: Artifact) -> Sensitivity:
    """Read an artifact's file.

    Raises:
        PT2Error: there is none, it is damaged, it was measured on another state of the artifact, or
            a figure is not finite or negative where it cannot be.
    """
    path = artifact.path / FILE
    if not path.is_file():
        raise PT2Error(f"{artifact.path} has no {FILE}; {_how(artifact)}")
    try:
        read_header(path)
        with safe_open(path, framework="numpy") as f:
            stored = (f.metadata() or {}).get(RECORD, "")
            energies = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (PT2Error, SafetensorError, OSError, ValueError, TypeError) as e:
        raise PT2Error(f"{path} is damaged ({e}); {_how(artifact)}") from e
    record = parse_json(stored, f"{path}: its record {RECORD!r}", unique=True)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise PT2Error(f"{path} is not of the format {FORMAT}; {_how(artifact)}")
    validate(record, _RECORD, path, _how(artifact))
    if record["artifact"] != digest(artifact):
        raise PT2Error(f"{path} is not of this state of the artifact; {_how(artifact)}")
    stated = record.pop("sha256")
    if stated != sha256_content(record, energies):
        raise PT2Error(f"{path} is damaged (not the checksum in its record); {_how(artifact)}")
    figures = record["figures"]
    _check_energies(path, artifact, set(figures["linears"]), energies)
    linears = {
        name: Linear(float(v["gain"]), float(v["error"]), energies[f"{name}.energy"])
        for name, v in figures["linears"].items()
    }
    tables = {k: float(v) for k, v in figures["tables"].items()}
    return Sensitivity(figures["tokens"], float(figures["kl"]), linears, tables)


_FIGURES = {
    "tokens": integer(1),
    "kl": number(),
    "linears": mapping(record_of({"gain": number(), "error": number(0)})),
    "tables": record_of({"embedding": number()}, {"head": number()}),
}
_RECORD = record_of(
    {"artifact": text(SHA256), "sha256": text(SHA256), "figures": record_of(_FIGURES)}
)


def _check_energies(
    path: Path, artifact: Artifact, linears: set[str], energies: dict[str, npt.NDArray[Any]]
) -> None:
    """There is one for every linear of the artifact, finite and not negative, of its width."""
    if set(artifact.matrices) != linears or {f"{n}.energy" for n in linears} != set(energies):
        raise PT2Error(f"{path} is not of the linears of this artifact; {_how(artifact)}")
    how = _how(artifact)
    for name in linears:
        value = energies[f"{name}.energy"]
        if value.dtype != np.float32 or value.shape != (artifact.matrices[name]["cols"],):
            raise PT2Error(f"{path}: the energies of {name} are not one float32 a column; {how}")
        if not (np.isfinite(value).all() and (value >= 0).all()):
            raise PT2Error(f"{path}: the energies of {name} have NaN, Inf or negatives; {how}")


def _how(artifact: Artifact) -> str:
    words = ("python", "-m", "quantize.sensitivities", artifact.path, "--calibration", "TEXT")
    return f"measure it: {command(*words)}"


def digest(artifact: Artifact) -> str:
    """What stands for the artifact's content: a hash of the checksums of its files."""
    files: dict[str, Any] = artifact.manifest["files"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
