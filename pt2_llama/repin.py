"""``pt2-llama repin VERSION``: does another llama-cpp-python take our edits, what is to be pinned?

Nothing is compiled and the cache stays as it is. For every edit one line says whether its anchor
stands where it is expected (ok), stands elsewhere (moved), stands several times (ambiguous) or is
gone (missing, with the lines that resemble it most). Then come the constants of
:mod:`pt2_llama.pinned`, which ``--write`` writes.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, sha256_file
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import open_reporter, say
from pt2_llama import pinned, source
from pt2_llama.c_source import line_of, outermost
from pt2_llama.cache import Places
from pt2_llama.edits import Edit, Misfit, find_anchor, short, try_edits
from pt2_llama.overlay import Overlay, load_overlay

OK, MOVED, AMBIGUOUS, MISSING = "ok", "moved", "ambiguous", "missing"
STATES = (OK, MOVED, AMBIGUOUS, MISSING)
C_SUFFIXES = (".c", ".cpp", ".cu", ".cuh", ".h")
_NAME = re.compile(r"([A-Za-z_][\w:~]*)\s*(?:\(|\[|=|\{|;|$)")


@dataclass(frozen=True)
class Finding:
    """What became of one edit.

    Attributes:
        edit: the edit.
        state: one of :data:`STATES`.
        line: of its anchor, where there is one.
        detail: where else it is, or what resembles it; empty where all is well.
    """

    edit: Edit
    state: str
    line: int | None = None
    detail: str = ""

    def __str__(self) -> str:
        at = self.edit.file + (f":{self.line}" if self.line else "")
        inside = f" inside {short(self.edit.inside)}" if self.edit.inside else ""
        more = f": {self.detail}" if self.detail else ""
        return f"{self.state:9} {self.edit.where}, {at}: {short(self.edit.anchor)}{inside}{more}"


@dataclass(frozen=True)
class Pins:
    """The constants of :mod:`pt2_llama.pinned` that differ from version to version."""

    version: str
    sdist_bytes: int
    sdist_sha256: str
    llama_commit: str
    tree_sha256: Mapping[str, str]

    def assignments(self) -> dict[str, str]:
        """Name -> the lines that assign it, as Python."""
        digests = "".join(f'    "{k}": "{v}",\n' for k, v in sorted(self.tree_sha256.items()))
        return {
            "VERSION": f'VERSION = "{self.version}"',
            "SDIST_BYTES": f"SDIST_BYTES = {self.sdist_bytes:_}",
            "SDIST_SHA256": f'SDIST_SHA256 = "{self.sdist_sha256}"',
            "LLAMA_COMMIT": f'LLAMA_COMMIT = "{self.llama_commit}"',
            "TREE_SHA256": f"TREE_SHA256: dict[str, str] = {{\n{digests}}}",
        }


def judge(new: Path, overlay: Overlay, old: Path | None = None) -> list[Finding]:
    """Try every edit on another source tree.

    Args:
        new: the unmodified tree of the other version.
        overlay: our files and edits.
        old: the unmodified tree of the pinned version; with it an anchor that stands in another
            function than before counts as moved.
    """
    findings: list[Finding] = []
    for path in dict.fromkeys(edit.file for edit in overlay.edits):
        edits = [e for e in overlay.edits if e.file == path]
        text = _read(new / path)
        before = _read(old / path) if old is not None else None
        found = [_judge_one(text, edit, before) for edit in edits]
        if text is not None and all(f.state == OK for f in found):
            found += [Finding(m.edit, AMBIGUOUS, detail=m.what) for m in try_edits(text, edits)[1]]
        findings += found
    gone = [f for f in findings if f.state == MISSING]
    elsewhere = _files_with({f.edit.anchor for f in gone}, new)
    return [_look_elsewhere(f, elsewhere) if f.state == MISSING else f for f in findings]


def _read(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8") if path.is_file() else None


def _judge_one(text: str | None, edit: Edit, before: str | None) -> Finding:
    if text is None:
        return Finding(edit, MISSING, detail="the file is not in the source tree")
    at = find_anchor(text, edit)
    if isinstance(at, Misfit):
        return _judge_misfit(text, edit, at)
    line = line_of(text, at)
    was = find_anchor(before, edit) if before is not None else None
    if isinstance(was, int) and before is not None and edit.file.endswith(C_SUFFIXES):
        now, then = _function(text, at), _function(before, was)
        if now != then:
            detail = f"in {now or 'no function'}, and was in {then or 'no function'}"
            return Finding(edit, MOVED, line, detail)
    return Finding(edit, OK, line)


def _judge_misfit(text: str, edit: Edit, misfit: Misfit) -> Finding:
    """An anchor that does not fit: is it elsewhere in its file, more often than once, or gone?"""
    count = text.count(edit.anchor)
    if edit.inside is None:
        if count:
            return Finding(edit, AMBIGUOUS, detail=_rest(misfit))
        return Finding(edit, MISSING, detail=_near(misfit.near))
    alone = find_anchor(text, replace(edit, inside=None))
    if isinstance(alone, int):
        where = f"it stands in {_function(text, alone) or 'no function'} now"
        return Finding(edit, MOVED, line_of(text, alone), f"{misfit.what}; {where}")
    state = AMBIGUOUS if count else MISSING
    return Finding(edit, state, detail=f"{misfit.what}; {_near(misfit.near)}".rstrip("; "))


def _rest(misfit: Misfit) -> str:
    return f"in lines {', '.join(map(str, misfit.elsewhere[:8]))}"


def _near(lines: Iterable[tuple[int, str]]) -> str:
    return "; ".join(f"nearest is line {n}, {short(line, 100)}" for n, line in lines)


def _function(text: str, at: int) -> str:
    """Name of the function or table around ``at``."""
    head = outermost(text, at)
    match = _NAME.search(head)
    return match[1] if match else head


def _files_with(anchors: set[str], tree: Path) -> dict[str, list[str]]:
    """Anchor -> "file:line" of the kept source files that have it."""
    found: dict[str, list[str]] = {}
    for path in source.needed_files(tree) if anchors else []:
        text = (tree / path).read_bytes().decode("utf-8", "replace")
        for anchor in anchors:
            at = text.find(anchor)
            if at >= 0:
                found.setdefault(anchor, []).append(f"{path}:{line_of(text, at)}")
    return found


def _look_elsewhere(finding: Finding, elsewhere: Mapping[str, list[str]]) -> Finding:
    places = elsewhere.get(finding.edit.anchor, [])
    if not places:
        return finding
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return replace(finding, state=MOVED, detail=f"it stands in {', '.join(places[:3])}{more}")


def taken_files(new: Path, overlay: Overlay) -> list[str]:
    """Files of ours that the other version has as well."""
    return [path for path in sorted(overlay.files) if (new / path).exists()]


def kept_files_gone(new: Path) -> list[str]:
    """What :mod:`pt2_llama.pinned` keeps by name and the other version does not have."""
    folders = [f"{f}/" for f in pinned.KEEP_FOLDERS if not (new / f).is_dir()]
    backends = [
        f"ggml/src/{b}/" for b in pinned.KEEP_BACKENDS if not (new / "ggml" / "src" / b).is_dir()
    ]
    return [*folders, *backends, *(f for f in pinned.KEEP_FILES if not (new / f).is_file())]


def commit_of(archive: Path, version: str) -> str | None:
    """The llama.cpp commit that the package's change log names for a version, or None."""
    name = f"llama_cpp_python-{version}/CHANGELOG.md"
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.name == name and member.isreg() and (content := tar.extractfile(member)):
                log = content.read().decode("utf-8", "replace")
                break
        else:
            return None
    section = re.search(rf"^## \[{re.escape(version)}\]\n(.*?)(?=^## |\Z)", log, re.M | re.S)
    commit = re.search(r"llama\.cpp@([0-9a-f]{7,40})\b", section[1]) if section else None
    return commit[1] if commit else None


def rewrite(text: str, pins: Pins) -> str:
    """``pinned.py`` with other constants.

    Raises:
        PT2Error: a constant is not assigned exactly once at the beginning of a line.
    """
    for name, lines in pins.assignments().items():
        pattern = rf"^{name}(?:: [^\n=]*)? = (?:\{{.*?^\}}|[^\n]*)$"
        found = list(re.finditer(pattern, text, flags=re.M | re.S))
        if len(found) != 1:
            raise PT2Error(f"pinned.py assigns {name} {len(found)} times; write it by hand")
        text = text[: found[0].start()] + lines + text[found[0].end() :]
    return text


def repin(
    where: Places,
    version: str,
    archive: Path | None = None,
    commit: str | None = None,
    write: Path | None = None,
) -> int:
    """The command; returns 0 when all edits fit, else 1.

    Args:
        archive: the source archive in place of a download.
        commit: of llama.cpp, where the package's change log does not say it.
        write: the ``pinned.py`` to write; None: only print the constants.

    Raises:
        PT2Error: the archive cannot be had or read, or holds no llama.cpp.
    """
    where.root.mkdir(parents=True, exist_ok=True)
    with temporary_folder(where.root, source.TEMPORARY) as work:
        (work / "download").mkdir()
        file = archive or source.fetch(work / "download", version)
        tree = work / "tree"
        with open_reporter().phase("unpacking", unit="files") as bar:
            prefix = pinned.sdist_prefix(version)
            if source.unpack(file, tree, bar.reach, prefix) == 0:
                raise PT2Error(f"{file} has no {prefix}: is it {pinned.sdist_name(version)}?")
        commit = commit or commit_of(file, version)
        if commit is None:
            raise PT2Error(
                f"the change log of {version} names no llama.cpp commit; give it with --commit"
            )
        overlay = load_overlay(where.overlay)
        pristine = where.pristine if where.pristine.is_dir() else None
        if pristine is None:
            say("the pinned source is not in the cache: functions are not compared with its own")
        findings = judge(tree, overlay, pristine)
        digests = source.tree_digests(tree, source.needed_files(tree))
        pins = Pins(version, file.stat().st_size, sha256_file(file), commit, digests)
        problems = [
            *(f"{path} is in llama.cpp as well" for path in taken_files(tree, overlay)),
            *(f"{path} is gone; mend pinned.py's lists" for path in kept_files_gone(tree)),
        ]
    fits = _show(findings, problems, pins)
    if write is not None:
        text = rewrite(write.read_text(encoding="utf-8"), pins)
        with atomic_path(write) as tmp:
            tmp.write_text(text, encoding="utf-8")
        say(f"wrote {write}; then: pt2-llama build")
    return 0 if fits else 1


def _show(findings: list[Finding], problems: list[str], pins: Pins) -> bool:
    for finding in sorted(findings, key=lambda f: STATES.index(f.state)):  # what is to do is last
        print(finding)
    for problem in problems:
        print(f"{'problem':9} {problem}")
    counts = Counter(f.state for f in findings)
    figures = ", ".join(f"{counts[state]} {state}" for state in STATES)
    title = f"{pinned.PACKAGE}=={pins.version} (llama.cpp {pins.llama_commit})"
    print(f"\n{title}: {len(findings)} edits, {figures}, {len(problems)} other problems\n")
    print("\n".join(pins.assignments().values()))
    return counts[OK] == len(findings) and not problems
