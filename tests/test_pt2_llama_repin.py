"""``pt2-llama repin``: what another version of the source does to our edits, said edit by edit."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from pt2_core.errors import PT2Error
from pt2_llama import pinned, repin
from pt2_llama.build import ensure_pristine
from pt2_llama.cache import Places, lock, places
from pt2_llama.cli import main
from pt2_llama.edits import Edit
from pt2_llama.overlay import Overlay, load_overlay

OPS = """\
void add(int type) {
    switch (type) {
        case Q4:
        case Q8: break;
    }
}

void set(int type) {
    switch (type) {
        case Q8: break;
    }
    finish(type);
}
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def edit(
    anchor: str, inside: str | None = None, file: str = "src/ops.cpp", number: int = 1
) -> Edit:
    return Edit(file, anchor, "after", "new", inside, where=f"edits.yaml, edit {number}")


def judged(tmp_path: Path, edits: list[Edit], new: dict[str, str]) -> list[tuple[str, str]]:
    old = write(tmp_path / "old", {"src/ops.cpp": OPS})
    tree = write(tmp_path / "new", new)
    findings = repin.judge(tree, Overlay({}, tuple(edits)), old)
    return [(f.state, f.detail) for f in findings]


def test_the_same_source_takes_every_edit(tmp_path: Path) -> None:
    edits = [edit("case Q8:", "void add("), edit("case Q8:", "void set("), edit("finish(type);")]
    assert judged(tmp_path, edits, {"src/ops.cpp": OPS}) == [("ok", "")] * 3


def test_a_line_that_went_elsewhere_is_said_where(tmp_path: Path) -> None:
    edits = [edit("finish(type);"), edit("case Q4:", "void add("), edit("    switch (type) {")]
    new = """\
void add(int type) {
    finish(type);
    switch (type) {
        case Q8: break;
    }
}

void set(int type) {
    switch (type) {
        case Q4:
        case Q8: break;
    }
}
"""
    assert judged(tmp_path, edits, {"src/ops.cpp": new}) == [
        ("moved", "in add, and was in set"),
        ("moved", "anchor 'case Q4:' occurs 0 times inside 'void add('; it stands in set now"),
        ("ambiguous", "in lines 3, 9"),
    ]
    moved = {"src/ops.cpp": OPS.replace("finish(type);", ""), "src/end.cpp": "finish(type);\n"}
    assert judged(tmp_path, edits[:1], moved) == [("moved", "it stands in src/end.cpp:1")]


def test_a_line_that_changed_is_missing_with_the_lines_next_to_it(tmp_path: Path) -> None:
    edits = [edit("    finish(type);"), edit("case Q4:", "void add("), edit("x", file="src/none.c")]
    new = OPS.replace("finish(type)", "finish(type, 0)").replace("void add(", "void sum(")
    assert judged(tmp_path, edits, {"src/ops.cpp": new}) == [
        ("missing", "nearest is line 12, 'finish(type, 0);'"),
        (
            "moved",
            "'void add(' begins 0 bodies and not one; it stands in sum now",
        ),
        ("missing", "the file is not in the source tree"),
    ]


def test_edits_that_overlap_in_the_new_source_are_no_success(tmp_path: Path) -> None:
    edits = [Edit("src/ops.cpp", a, "replace", "", where="e") for a in ("finish(", "finish(type)")]
    ((first, _), (second, _), (third, detail)) = judged(tmp_path, edits, {"src/ops.cpp": OPS})
    assert (first, second, third) == ("ok", "ok", "ambiguous") and "overlap" in detail


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The archive of a version 9.9.9, and a project with one edit whose own source is cached."""
    where = Places(root=tmp_path / "cache", overlay=tmp_path / "third_party")
    write(where.pristine, {"src/ops.cpp": OPS})
    write(where.overlay, {"edits.yaml": "- {file: src/ops.cpp, anchor: finish(type);, after: x}\n"})
    monkeypatch.setattr("pt2_llama.cli.places", lambda: where)
    for name in ("KEEP_FILES", "KEEP_BACKENDS"):
        monkeypatch.setattr(pinned, name, ())
    monkeypatch.setattr(pinned, "KEEP_FOLDERS", ("src",))
    shutil.copy2(Path(pinned.__file__), tmp_path / "pinned.py")
    monkeypatch.setattr(pinned, "__file__", str(tmp_path / "pinned.py"))
    return tmp_path / "llama_cpp_python-9.9.9.tar.gz"


LOG = "# Changelog\n\n## [9.9.9]\n\n- feat: ggml-org/llama.cpp@abcdef012\n\n## [9.9.8]\n"


def archive(path: Path, ops: str = OPS, log: str = LOG) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        root = "llama_cpp_python-9.9.9"
        for name, text in {
            f"{root}/CHANGELOG.md": log,
            f"{root}/vendor/llama.cpp/src/ops.cpp": ops,
            f"{root}/vendor/llama.cpp/docs/not-needed.md": "",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_a_version_that_fits_is_pinned_by_write(other: Path, capsys) -> None:
    command = ["repin", "9.9.9", "--archive", str(archive(other))]
    before = Path(pinned.__file__).read_text()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "1 edits, 1 ok, 0 moved, 0 ambiguous, 0 missing, 0 other problems" in out
    assert Path(pinned.__file__).read_text() == before

    assert main([*command, "--write"]) == 0
    values: dict[str, object] = {}
    exec(Path(pinned.__file__).read_text(), values)
    assert (values["VERSION"], values["LLAMA_COMMIT"]) == ("9.9.9", "abcdef012")
    assert values["SDIST_BYTES"] == other.stat().st_size
    assert values["SDIST_NAME"] == other.name and list(values["TREE_SHA256"]) == ["src"]
    for name in ("VERSION", "LLAMA_COMMIT", "SDIST_BYTES", "SDIST_SHA256"):
        assert f"\n{name} = " in out and out.count(f"\n{name} = ") == 1
    kept = [n for n in before.splitlines() if n.startswith(("KEEP", "DROP", "def", "PACKAGE"))]
    assert [n for n in Path(pinned.__file__).read_text().splitlines() if n in kept] == kept


def test_a_version_that_does_not_fit_is_said_and_ends_with_1(other: Path, capsys) -> None:
    changed = archive(other, OPS.replace("finish", "end"), LOG.replace("abcdef012", "master"))
    assert main(["repin", "9.9.9", "--archive", str(changed)]) == 2
    assert "names no llama.cpp commit; give it with --commit" in capsys.readouterr().err
    assert main(["repin", "9.9.9", "--archive", str(changed), "--commit", "abcdef0"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("missing   edits.yaml, edit 1, src/ops.cpp: 'finish(type);'")
    assert 'LLAMA_COMMIT = "abcdef0"' in out


def test_another_archive_is_refused(other: Path, tmp_path: Path, capsys) -> None:
    assert main(["repin", "9.9.8", "--archive", str(archive(other))]) == 2
    assert "has no llama_cpp_python-9.9.8/vendor/llama.cpp/" in capsys.readouterr().err
    other.write_bytes(b"no archive")
    assert main(["repin", "9.9.9", "--archive", str(other)]) == 2
    assert "damaged" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["pristine"]


def test_a_constant_that_is_not_there_once_is_refused() -> None:
    pins = repin.Pins("1", 1, "a", "b", {})
    with pytest.raises(PT2Error, match=r"assigns VERSION 0 times"):
        repin.rewrite("", pins)


# -- the real source -------------------------------------------------------------------------------


@pytest.mark.llama
def test_a_doctored_copy_of_the_pinned_source(tmp_path: Path) -> None:
    """One anchor moves into another function, one changes; all other edits still fit."""
    where = places()
    with lock(where, "a test of repin"):
        pristine = ensure_pristine(where)
    overlay = load_overlay(where.overlay)
    for path in {e.file for e in overlay.edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pristine / path, tmp_path / path)
    assert {f.state for f in repin.judge(tmp_path, overlay, pristine)} == {"ok"}

    anchor = "        // If tiled is supported, it will execute"
    changed = next(e for e in overlay.edits if e.anchor.strip().startswith(anchor.strip()))
    text = (tmp_path / changed.file).read_text()
    assert text.count("it will execute the full op here") == 1
    text = text.replace("it will execute the full op here", "it executes the full operator here")
    (tmp_path / changed.file).write_text(text)

    moved = next(e for e in overlay.edits if e.inside == "void ggml_compute_forward_out_prod(")
    text = (tmp_path / moved.file).read_text()
    start = text.index("void ggml_compute_forward_out_prod(")
    at = text.index(moved.anchor, start)
    text = text[:at] + text[at:].replace(moved.anchor + "\n", "", 1)
    (tmp_path / moved.file).write_text(text)

    bad = {f.edit.inside or f.edit.anchor: f for f in repin.judge(tmp_path, overlay, pristine)}
    bad = {name: f for name, f in bad.items() if f.state != "ok"}
    assert set(bad) == {moved.inside, changed.anchor}
    assert bad[changed.anchor].state == "missing"
    assert "it executes the full operator here" in bad[changed.anchor].detail
    assert "occurs 0 times inside 'void ggml_compute_forward_out_prod('" in bad[moved.inside].detail
