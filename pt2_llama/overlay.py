"""Our changes of llama.cpp as files, and keeping a patched source tree in step with them.

The patched tree is always made from the unmodified one, and only files whose content changes are
written. So a tree is never patched twice, and ninja rebuilds only what a change of the overlay
touches, because every other file keeps its time stamp.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_llama import source
from pt2_llama.edit_lists import parse_edits
from pt2_llama.edits import Edit, EditsDoNotFit, Misfit, try_edits

CUDA_FOLDER = "ggml/src/ggml-cuda/"
IGNORED_SUFFIXES = ("~", ".swp", ".orig", ".rej", ".pyc")


@dataclass(frozen=True)
class Overlay:
    """New files and edits.

    Attributes:
        files: path in the source tree -> content, files that the source does not have.
        edits: changes of files that it has.
    """

    files: Mapping[str, bytes]
    edits: tuple[Edit, ...]

    def for_variant(self, variant: str) -> Overlay:
        """The part that a variant compiles: work on CUDA leaves builds for the CPU valid."""
        if variant == "cuda":
            return self
        files = {p: c for p, c in self.files.items() if not p.startswith(CUDA_FOLDER)}
        return Overlay(files, tuple(e for e in self.edits if not e.file.startswith(CUDA_FOLDER)))

    def has_cuda_kernels(self) -> bool:
        """Whether our types are hooked into the CUDA backend."""
        return any(e.file.startswith(CUDA_FOLDER) for e in self.edits)

    def digest(self) -> str:
        """Hex SHA-256 of everything that reaches the compiler (not of comments and reasons)."""
        edits = [[e.file, e.anchor, e.action, e.text, e.inside] for e in self.edits]
        digest = hashlib.sha256(json.dumps(edits).encode())
        for path in sorted(self.files):
            content = hashlib.sha256(self.files[path]).hexdigest()
            digest.update(f"{path}\0{content}\n".encode())
        return digest.hexdigest()


def load_overlay(folder: Path) -> Overlay:
    """Read ``folder/overlay/**`` and every ``folder/edits*.yaml``; any may be missing.

    Hidden files, editors' backups and Python caches are not part of it. The lists are joined in the
    order of their names.

    Raises:
        PT2Error: a list is not what :func:`parse_edits` accepts.
    """
    files: dict[str, bytes] = {}
    root = folder / "overlay"
    for base, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        for name in names:
            if not name.startswith(".") and not name.endswith(IGNORED_SUFFIXES):
                path = Path(base) / name
                files[path.relative_to(root).as_posix()] = path.read_bytes()
    edits: list[Edit] = []
    for path in sorted(folder.glob("edits*.yaml")):
        edits += parse_edits(path.read_text(encoding="utf-8"), path.name)
    return Overlay(files, tuple(edits))


def patched_files(pristine: Path, overlay: Overlay) -> dict[str, bytes]:
    """Path -> content of every file in which the patched tree differs from the unmodified one.

    Raises:
        PT2Error: an overlay file exists in the source already.
        EditsDoNotFit: an edited file does not exist, or anchors do not fit: all of them.
    """
    result = dict(overlay.files)
    for path in overlay.files:
        if (pristine / path).exists():
            raise PT2Error(
                f"overlay file {path} exists in llama.cpp already; change it in edits.yaml instead"
            )
    misfits: list[Misfit] = []
    for path in dict.fromkeys(edit.file for edit in overlay.edits):
        edits = [e for e in overlay.edits if e.file == path]
        if not (pristine / path).is_file():
            misfits += [Misfit(edit, "not in the source tree") for edit in edits]
            continue
        # newline="" would be needed for text mode; bytes keep line ends as they are.
        text = (pristine / path).read_bytes().decode("utf-8")
        edited, problems = try_edits(text, edits)
        misfits += problems
        result[path] = edited.encode("utf-8")
    if misfits:
        raise EditsDoNotFit(misfits)
    return result


def sync_patched(pristine: Path, patched: Path, overlay: Overlay) -> int:
    """Make ``patched`` the unmodified tree plus the overlay; returns how many files changed.

    The stamp is removed first and written last: a tree with a stamp is complete.

    Raises:
        PT2Error: as :func:`patched_files`; nothing has been changed then.
    """
    if (pristine / source.PATCH_STAMP).exists():
        raise PT2Error(f"{pristine} is already patched; the unmodified source is needed")
    ours = patched_files(pristine, overlay)
    wanted = set(ours) | set(source.needed_files(pristine))
    patched.mkdir(parents=True, exist_ok=True)
    (patched / source.PATCH_STAMP).unlink(missing_ok=True)
    changed = _remove_others(patched, wanted)
    for path in sorted(wanted):
        target = patched / path
        content = ours[path] if path in ours else (pristine / path).read_bytes()
        if target.is_file() and target.read_bytes() == content:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        if path not in ours:
            shutil.copymode(pristine / path, target)
        changed += 1
    stamp = {"overlay": overlay.digest(), "files": sorted(ours)}
    write_json(patched / source.PATCH_STAMP, stamp)
    return changed


def _remove_others(tree: Path, wanted: set[str]) -> int:
    removed = 0
    for path in sorted(tree.rglob("*"), reverse=True):
        relative = path.relative_to(tree).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif relative not in wanted and "__pycache__" not in path.parts:
            path.unlink()
            removed += 1
    return removed


def stamp_digest(tree: Path) -> str | None:
    """The overlay digest a patched tree was completed with, or None."""
    stamp = tree / source.PATCH_STAMP
    if not stamp.is_file():
        return None
    try:
        digest = read_json(stamp).get("overlay")
    except (PT2Error, AttributeError):
        return None  # a damaged stamp: the tree is made again
    return digest if isinstance(digest, str) else None
