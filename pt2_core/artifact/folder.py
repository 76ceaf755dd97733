"""The artifact: what pt2-quantize writes and pt2-export reads (docs/design.md, "The artifact").

The reader and the writer stand side by side, so that they change together. Plain NumPy: whoever
only reads an artifact need not import torch.

    art = Artifact.open("wiki-llama-7m-pt2")
    for name, m in art.block(0).items():
        print(name, m.rows, m.cols, m.dequantize().dtype)   # ... float32, source column order
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pt2_core.artifact.manifest import check_errors, check_manifest, tensor_of
from pt2_core.artifact.matrix import PARTS, TernaryMatrix, is_permutation
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, make_folder, read_json, sha256_file, write_json
from pt2_core.model.fold_edges import FoldEdges
from pt2_core.process.temporary import remove_dead
from pt2_core.safetensors_file import read_header
from pt2_core.schema import shown

FORMAT = "pt2-artifact"
# 2 says that there are replaced tensors, which a reader of version 1 would leave out in silence.
FORMAT_VERSION, REPLACING_VERSION = 1, 2
MANIFEST = "manifest.json"
GLOBAL = "global.safetensors"
REPLACED = "replaced.safetensors"
PROOF = "proof.safetensors"
RUN = "run.json"
RESIDUAL_PERM = "residual.perm"

Array = npt.NDArray[Any]


def block_file(index: int) -> str:
    """The name of decoder block ``index``'s file."""
    return f"block-{index:05d}.safetensors"


# Reading ------------------------------------------------------------------------------------------


@dataclass
class Artifact:
    """An artifact opened for reading; blocks are read and checked when asked for."""

    path: Path
    manifest: dict[str, Any]
    residual_perm: Array
    _checked: set[str] = field(default_factory=set, repr=False)
    _homes: dict[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, allow_incomplete: bool = False) -> Artifact:
        """Open a folder and check its manifest and ``global.safetensors``.

        Raises:
            PT2Error: no artifact there, damaged, of another version, or not complete.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if not manifest["complete"] and not allow_incomplete:
            raise PT2Error(f"{path} is not complete: finish it with: {_finish(path)}")
        artifact = cls(path, manifest, np.empty(0, np.int32))
        perm = artifact.tensors(GLOBAL).get(RESIDUAL_PERM)
        if perm is None or perm.dtype != np.int32 or perm.ndim != 1 or not is_permutation(perm):
            raise PT2Error(f"{path / GLOBAL}: {RESIDUAL_PERM} is missing or not a permutation")
        artifact.residual_perm = perm
        return artifact

    @property
    def matrices(self) -> dict[str, dict[str, Any]]:
        """Per ternary matrix: rows, cols, block_size, order, errors (as in the manifest)."""
        return self.manifest["matrices"]

    def tensor_of(self, matrix: str) -> tuple[str, int | None]:
        """The checkpoint's tensor that a matrix is of, and which expert it is (None: all of it)."""
        return tensor_of(matrix, self.matrices[matrix])

    def transposed(self, matrix: str) -> bool:
        """Whether the checkpoint holds a matrix as ``[cols, rows]``."""
        return bool(self.matrices[matrix].get("transposed"))

    def fold(self) -> FoldEdges | None:
        """What the orders of columns fold into; None where the manifest does not say."""
        value = self.manifest.get("fold")
        return None if value is None else FoldEdges.from_json(value, self.path / MANIFEST)

    def homes(self) -> dict[str, int]:
        """Ternary matrix -> the number of the block file that it stands in.

        Raises:
            PT2Error: a block's file is missing or no safetensors, or a matrix stands in none.
        """
        if not self._homes:
            for index in range(self.n_blocks):
                for name in read_header(self.path / block_file(index)):
                    self._homes.setdefault(name.rpartition(".")[0], index)
        if missing := sorted(self.matrices.keys() - self._homes.keys()):
            raise PT2Error(
                f"{self.path / MANIFEST} names {missing[0]}, which no block file holds; "
                "quantise again"
            )
        return {name: self._homes[name] for name in self.matrices}

    @property
    def kept(self) -> dict[str, str]:
        """Linears left as they are -> reason."""
        return self.manifest["kept"]

    @property
    def n_blocks(self) -> int:
        """How many decoder blocks are in the artifact."""
        return sum(1 for name in self.manifest["files"] if name.startswith("block-"))

    def replaced(self) -> dict[str, Array]:
        """Tensors that take the place of the source model's (refined norms, say), float32.

        Returns:
            the tensor's name in the source model -> values; empty where there are none.
        """
        if REPLACED not in self.manifest["files"]:
            return {}
        tensors = self.tensors(REPLACED)
        known = self.manifest["model"].get("tensors", {})
        for name, value in tensors.items():
            if value.dtype != np.float32 or known.get(name) != list(value.shape):
                raise PT2Error(f"{self.path / REPLACED}: {name} does not fit the source model")
            if not np.isfinite(value).all():
                raise PT2Error(f"{self.path / REPLACED}: {name} has NaN or Inf in it")
        return tensors

    def _again(self) -> str:
        return command("pt2-quantize", "MODEL", "-o", self.path, "--overwrite")

    def source_model(self, given: str | os.PathLike[str] | None, option: str) -> Path:
        """Folder of the model that it was made from: ``given``, or where run.json says.

        Raises:
            PT2Error: run.json does not name a folder that is there; ``option`` gives it.
        """
        if given is not None:
            return Path(given)
        file = self.path / RUN
        record = read_json(file) if file.is_file() else {}
        folder = record.get("model_dir") if isinstance(record, dict) else None
        if not isinstance(folder, str) or not os.path.isdir(folder):
            raise PT2Error(f"{file} does not say where the model is now: give it with {option} DIR")
        return Path(folder)

    def block(self, index: int) -> dict[str, TernaryMatrix]:
        """The ternary linears of decoder block ``index`` by module name.

        Raises:
            PT2Error: the file is missing, damaged, or does not hold what the manifest says.
        """
        tensors = self.tensors(block_file(index))
        names = sorted({name.rpartition(".")[0] for name in tensors})
        where = str(self.path / block_file(index))
        result = {}
        for name in names:
            parts = {p: tensors.get(f"{name}.{p}") for p in PARTS}
            if any(v is None for v in parts.values()) or name not in self.matrices:
                raise PT2Error(f"{where}: {name} does not match the manifest; quantise again")
            levels = self.matrices[name].get("levels", 3)
            result[name] = TernaryMatrix(
                name, **{k: v for k, v in parts.items() if v is not None}, levels=levels
            )
            result[name].check(where)
            self._check_record(result[name], where)
        self.homes()
        return result

    def _check_record(self, m: TernaryMatrix, where: str) -> None:
        """The manifest's figures are what exporter and evaluation plan by: they must be true."""
        record = self.matrices[m.name]
        size = record.get("block_size", m.block_size)
        if (record["rows"], record["cols"], size) != (m.rows, m.cols, m.block_size):
            raise PT2Error(
                f"{where}: {m.name} is {m.rows} x {m.cols} in blocks of {m.block_size}, not as "
                "the manifest says; quantise again"
            )

    def tensors(self, file: str) -> dict[str, Array]:
        """All tensors of one of the artifact's files, its checksum verified.

        Raises:
            PT2Error: the manifest does not name the file, or it is missing or damaged.
        """
        path = self.path / file
        expected = self.manifest["files"].get(file)
        if expected is None:
            raise PT2Error(f"{self.path / MANIFEST} has no entry for {file}; quantise again")
        read_header(path)
        if file not in self._checked:
            if sha256_file(path) != expected:
                raise PT2Error(
                    f"{path} is damaged (not the checksum that {MANIFEST} names); "
                    f"make it again with: {self._again()}"
                )
            self._checked.add(file)
        try:
            return load_file(path)
        except (SafetensorError, ValueError, TypeError) as e:
            raise PT2Error(f"{path} cannot be read ({e}); quantise again") from e


def _finish(path: Path) -> str:
    """The command that finishes an artifact: as its run noted it, else without its settings."""
    try:
        resume = read_json(path / RUN).get("resume")
    except (PT2Error, AttributeError):
        resume = None
    if isinstance(resume, str):
        return resume
    return command("pt2-quantize", "MODEL", "-o", path, "--resume") + " and the settings it had"


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check ``manifest.json``.

    Raises:
        PT2Error: missing, not JSON, not ours, of another format version, or with an entry missing
            or wrong (:mod:`pt2_core.artifact.manifest`), whose place is named.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise PT2Error(f"{path} is not an artifact (no {MANIFEST}); make one with pt2-quantize")
    value = read_json(file, unique=True)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise PT2Error(f"{file} is not the manifest of an artifact (format is not {FORMAT!r})")
    version = value.get("format_version")
    if type(version) is not int or version not in (FORMAT_VERSION, REPLACING_VERSION):
        raise PT2Error(
            f"{file} has format version {shown(version)}; this program reads {FORMAT_VERSION} and "
            f"{REPLACING_VERSION}"
        )
    check_manifest(value, file)
    return value


# Writing ------------------------------------------------------------------------------------------


class ArtifactWriter:
    """Writes an artifact block by block, so that it can be taken up again after any crash.

    The manifest names a block only after the block's file is safely on the disk: a file that the
    manifest does not name is ignored and written again.
    """

    def __init__(self, path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
        self.path = Path(path)
        self.manifest = manifest

    @classmethod
    def create(cls, path: str | os.PathLike[str], identity: dict[str, Any]) -> ArtifactWriter:
        """Start an artifact. ``identity`` holds model, settings, versions, calibration, kept."""
        path = Path(path)
        make_folder(path)
        remove_leftovers(path, everything=True)
        manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "complete": False,
                    "files": {}, "matrices": {}, **identity}  # fmt: skip
        writer = cls(path, manifest)
        writer._save()
        return writer

    @classmethod
    def resume(cls, path: str | os.PathLike[str], identity: dict[str, Any]) -> ArtifactWriter:
        """Take up an artifact again.

        Raises:
            PT2Error: there is none, or it was made with another model, other settings, versions or
                calibration text; the first difference is named.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for part in ("model", "settings", "versions", "calibration", "kept"):
            difference = first_difference(manifest.get(part), identity[part], part)
            if difference:
                raise PT2Error(
                    f"cannot resume {path}: {difference}; use the old settings, or --overwrite"
                )
        if manifest["matrices"]:
            check_errors(manifest, path / MANIFEST)
        remove_leftovers(path)
        return cls(path, manifest)

    @property
    def blocks_done(self) -> int:
        """Number of leading decoder blocks that are on the disk."""
        n = 0
        while block_file(n) in self.manifest["files"]:
            n += 1
        return n

    def write_global(self, residual_perm: Array) -> None:
        """Write ``global.safetensors``; ``residual_perm`` is int32 ``[hidden]``."""
        self._write(GLOBAL, {RESIDUAL_PERM: residual_perm.astype(np.int32)})
        self._save()

    def write_block(
        self, index: int, matrices: list[TernaryMatrix], records: dict[str, dict[str, Any]]
    ) -> None:
        """Write decoder block ``index`` and then name it in the manifest.

        Args:
            matrices: the block's ternary linears.
            records: module name -> what the manifest says of it (rows, cols, errors, ...).
        """
        tensors = {f"{m.name}.{part}": getattr(m, part) for m in matrices for part in PARTS}
        self._write(block_file(index), tensors)
        self.manifest["matrices"].update(records)
        self._save()

    def write_replaced(self, tensors: dict[str, Array]) -> None:
        """Write tensors that take the place of the source model's, by its names, float32."""
        self.manifest["format_version"] = REPLACING_VERSION
        self._write(REPLACED, {k: v.astype(np.float32) for k, v in tensors.items()})
        self._save()

    def write_proof(self, tensors: dict[str, Array], record: dict[str, Any]) -> None:
        """Write ``proof.safetensors`` (see :mod:`pt2_core.artifact.proof`) and its record."""
        self.manifest["proof"] = record
        self._write(PROOF, tensors)
        self._save()

    def drop_damaged(self, linears: Callable[[int], Sequence[str]]) -> list[str]:
        """Forget the first block whose file is gone or damaged, and all after it; likewise others.

        What is forgotten is written again as after a crash.

        Args:
            linears: names of the ternary linears of a decoder block by its number.

        Returns:
            the files that were found gone or damaged, with what is wrong with them.
        """
        files = self.manifest["files"]
        problems = {name: _file_problem(self.path / name, files[name]) for name in sorted(files)}
        found = [f"{name} is {problem}" for name, problem in problems.items() if problem]
        if not found:
            return []
        blocks = [i for i in range(self.blocks_done) if problems[block_file(i)]]
        if blocks:
            for index in range(blocks[0], self.blocks_done):
                for name in linears(index):
                    self.manifest["matrices"].pop(name, None)
                self.manifest.get("activations", {}).pop(str(index), None)
                problems[block_file(index)] = "to be written again"
            if PROOF in files:  # it is of the blocks that were there
                problems[PROOF] = "to be written again"
        for name, problem in problems.items():
            if problem:
                files.pop(name, None)
        if problems.get(PROOF):
            self.manifest.pop("proof", None)
        self.manifest["complete"] = False
        self._save()
        return found

    def record(self, key: str, name: str, value: Any) -> None:
        """Set ``manifest[key][name]`` (saved with the next block)."""
        self.manifest.setdefault(key, {})[name] = value

    def finish(self) -> None:
        """Mark the artifact complete."""
        self.manifest["complete"] = True
        self._save()

    def _write(self, file: str, tensors: dict[str, Array]) -> None:
        with atomic_path(self.path / file) as tmp:
            try:
                save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp)
            except SafetensorError as e:
                raise PT2Error(f"cannot write {self.path / file}: {e}") from e
            digest = sha256_file(tmp)
        self.manifest["files"][file] = digest

    def _save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)


def _file_problem(path: Path, expected: str) -> str | None:
    """``gone`` or ``damaged``; None for a file that has its checksum."""
    if not path.is_file():
        return "gone"
    return None if sha256_file(path) == expected else "damaged"


def remove_leftovers(path: Path, *, everything: bool = False) -> None:
    """Remove temporary files of a killed run; with ``everything``, an older artifact as well.

    Of an artifact only names that this module writes are touched.
    """
    ours = r"(manifest|run)\.json|(global|replaced|proof|sensitivity|block-\d{5})\.safetensors"
    remove_dead(path, rf"{ours}|refine-state\.safetensors")
    if not everything:
        return
    # The manifest goes first: without it the rest is no artifact, should we be killed half way.
    for file in sorted(path.iterdir(), key=lambda f: f.name != MANIFEST):
        if re.fullmatch(ours, file.name):
            file.unlink(missing_ok=True)


def first_difference(old: Any, new: Any, at: str) -> str | None:
    """Name the first place where two JSON values differ, or None.

    >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}}, "settings")
    'settings.a.b was 1 and is now 2'
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            difference = first_difference(old.get(key), new.get(key), f"{at}.{key}")
            if difference:
                return difference
        return None
    return None if old == new else f"{at} was {old!r} and is now {new!r}"


def sha256_array(value: Array) -> str:
    """Hex SHA-256 of an array's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{value.dtype.str}{value.shape}".encode())
    digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()
