"""What is checked before an export starts, and how its files come and go."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from export.config import ExportConfig
from pt2_core import upstream
from pt2_core.artifact.folder import RUN, Artifact
from pt2_core.errors import PT2Error, reason
from pt2_core.files import human_bytes, read_json
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.temporary import SUFFIX, temporary_folder

# Metadata, tokenizer and padding beside the tensors, when guessing what the disk must hold.
SPARE_BYTES = 32 << 20

Progress = Callable[[str, int, int], None]


def source_model(artifact: Artifact) -> Path:
    """The folder of the model that an artifact was made from, as ``run.json`` remembers it.

    Raises:
        PT2Error: it does not say, or the folder is gone.
    """
    file = artifact.path / RUN
    record = read_json(file) if file.is_file() else {}
    folder = record.get("model_dir") if isinstance(record, dict) else None
    if not isinstance(folder, str):
        raise PT2Error(f"{file} does not name the source model: give its folder with --model DIR")
    if not os.path.isdir(folder):  # a name that no path can have is no folder either
        raise PT2Error(f"the source model is no longer at {folder}: give its folder with --model")
    return Path(folder)


def check_output(out: Path, config: ExportConfig) -> None:
    """Raise PT2Error unless ``out`` can be written and nothing is in the way."""
    if out.is_dir():
        raise PT2Error(f"{out} is a folder: name a file in it, such as {out / 'model.gguf'}")
    if out.suffix != ".gguf":
        raise PT2Error(f"the output {out} must end in .gguf")
    if not out.parent.is_dir():
        raise PT2Error(f"the folder {out.parent} does not exist: make it first")
    if os.statvfs(out.parent).f_flag & os.ST_RDONLY:
        raise PT2Error(f"cannot write into {out.parent}: it is read-only; choose another output")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise PT2Error(f"cannot write into {out.parent}: permission denied; choose another output")
    splits = sorted(out.parent.glob(f"{out.stem}-*-of-*.gguf")) if config.split_max_size else []
    for old in [out, *splits]:
        if old.exists() and not config.overwrite:
            raise PT2Error(f"{old} exists: give another name, or --overwrite")


def check_model(artifact: Artifact, model: Checkpoint, progress: Progress) -> None:
    """Raise PT2Error unless the model's files are those that the artifact was made from."""
    total = model.bytes
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress("checking the model (MiB)", min(done, total) >> 20, max(total >> 20, 1))

    fingerprint, _ = model.fingerprint(progress=step)
    if fingerprint != artifact.manifest["model"].get("fingerprint"):
        raise PT2Error(
            f"{model.path} is not the model that {artifact.path} was made from (its files differ): "
            "give the right one with --model"
        )


def check_shapes(artifact: Artifact, model: Checkpoint) -> None:
    """Raise PT2Error unless manifest, block files and model agree on matrices and shapes."""
    for matrix in artifact.homes():
        record = artifact.matrices[matrix]
        tensor, expert = artifact.tensor_of(matrix)
        shape = (record["rows"], record["cols"])
        info = model.tensors.get(tensor)
        found = None if info is None else tuple(info.shape)
        if found is not None and expert is not None:
            found = found[1:] if len(found) == 3 and expert < found[0] else None
        if found != (shape[::-1] if artifact.transposed(matrix) else shape):
            raise PT2Error(
                f"{model.path} is not the model of {artifact.path}: {matrix} should be "
                f"{shape[0]} x {shape[1]}; give the right one with --model"
            )
    hidden = model.settings.get("hidden_size")
    if hidden is not None and len(artifact.residual_perm) != hidden:
        raise PT2Error(f"{model.path} is not the model of {artifact.path}: another hidden size")


def check_grid(artifact: Artifact, kind: str) -> None:
    """Raise PT2Error where the type does not hold the artifact's grid."""
    grid = upstream.grid_of(artifact.manifest)
    if grid == kind or (grid == "pt2" and kind not in upstream.TYPES):
        return
    if grid == "pt2":
        raise PT2Error(
            f"{artifact.path} has an offset in its grid, which {kind} does not hold: use another "
            f"--type, or quantise again with --grid {kind}"
        )
    raise PT2Error(f"{artifact.path} was quantised to the grid {grid}: use --type {grid}")


def check_disk(out: Path, model: Checkpoint, ternary: Collection[str]) -> None:
    """Raise PT2Error when the disk of ``out`` has less free than the export will roughly take."""
    ordinary = sum(math.prod(t.shape) for n, t in model.tensors.items() if n not in ternary)
    # The carrier holds the ordinary tensors in float32; the output, at most in F16 as a rule.
    packed = sum(math.prod(model.info(name).shape) * 3 // 8 for name in ternary)
    needed = 6 * ordinary + packed + SPARE_BYTES
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise PT2Error(
            f"{out.parent.absolute()} has {human_bytes(free)} free and exporting needs about "
            f"{human_bytes(needed)}: the disk is too full; free some space or choose another"
        )


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside the output, removed whatever happens but a kill.

    What a killed export to this name has left (as large as the model's embeddings) goes first.
    """
    try:
        with temporary_folder(out.parent, f".{out.name}.", SUFFIX) as work:
            yield work
    except BrokenPipeError:
        raise
    except OSError as e:
        raise PT2Error(f"cannot write into {out.parent}: {reason(e)}") from e


def publish(files: list[Path], out: Path, config: ExportConfig) -> list[Path]:
    """Move finished files to their final names; the first split last, it is the one to load."""
    final = [out.parent / f.name for f in files]
    for target in final:
        if target.exists() and not config.overwrite:
            raise PT2Error(f"{target} exists: give another name, or --overwrite")
    for file, target in reversed(list(zip(files, final, strict=True))):
        os.replace(file, target)
    return final
