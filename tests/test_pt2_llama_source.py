"""Fetching and checking the source: nothing that is not the pinned one gets through."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import pytest

from pt2_core.errors import PT2Error
from pt2_llama import pinned, source

FILES = {
    "CMakeLists.txt": b"project(x)\n",
    "ggml/CMakeLists.txt": b"# ggml\n",
    "ggml/src/ggml.c": b"int ggml;\n",
    "ggml/src/ggml-cpu/ops.cpp": b"int ops;\n",
    "ggml/src/ggml-sycl/x.cpp": b"not needed\n",
    "docs/readme.md": b"not needed\n",
    "tools/ui/package.json": b"not needed\n",
    "tools/ui/CMakeLists.txt": b"# ui\n",
}
NEEDED = [p for p in FILES if b"not needed" not in FILES[p]]


def write_archive(path: Path, extra: tuple[tuple[tarfile.TarInfo, bytes], ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in FILES.items():
            info = tarfile.TarInfo(pinned.SDIST_PREFIX + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info, content in extra:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_tree(root: Path) -> Path:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def pin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive that is the pinned one for the time of a test."""
    archive = write_archive(tmp_path / "sdist.tar.gz")
    tree = write_tree(tmp_path / "tree")
    monkeypatch.setattr(pinned, "SDIST_BYTES", archive.stat().st_size)
    monkeypatch.setattr(pinned, "SDIST_SHA256", source.sha256_file(archive))
    digests = source.tree_digests(tree, source.needed_files(tree))
    monkeypatch.setattr(pinned, "TREE_SHA256", digests)
    return archive


def test_only_needed_files_are_unpacked(tmp_path: Path) -> None:
    archive = write_archive(tmp_path / "a.tar.gz")
    assert source.unpack(archive, tmp_path / "out") == len(NEEDED)
    assert source.needed_files(tmp_path / "out") == sorted(NEEDED)
    for name in NEEDED:
        assert (tmp_path / "out" / name).read_bytes() == FILES[name]


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", pinned.SDIST_PREFIX + "ggml/../../../../evil"]
)
def test_members_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    archive = write_archive(tmp_path / "a.tar.gz", ((tarfile.TarInfo(name), b"evil"),))
    with pytest.raises(PT2Error, match="unsafe member"):
        source.unpack(archive, tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_place_of_sources_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo(pinned.SDIST_PREFIX + "ggml/src/link.c")
    info.type, info.linkname = kind, "/etc/passwd"
    archive = write_archive(tmp_path / "a.tar.gz", ((info, b""),))
    with pytest.raises(PT2Error, match="is a link or device"):
        source.unpack(archive, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 10, 60, -1])
def test_a_cut_archive_is_damaged(tmp_path: Path, keep: int) -> None:
    archive = write_archive(tmp_path / "a.tar.gz")
    content = archive.read_bytes()
    archive.write_bytes(content[: keep if keep >= 0 else len(content) // 2])
    with pytest.raises(PT2Error, match=r"is damaged .*download it again"):
        source.unpack(archive, tmp_path / "out")


def test_size_and_hash_are_checked(tmp_path: Path, pin: Path) -> None:
    source.check_archive(pin)
    content = bytearray(pin.read_bytes())
    short = tmp_path / "short.tar.gz"
    short.write_bytes(content[:-1])
    with pytest.raises(PT2Error, match="is cut off or another file"):
        source.check_archive(short)
    content[len(content) // 2] ^= 1
    flipped = tmp_path / "flipped.tar.gz"
    flipped.write_bytes(content)
    with pytest.raises(PT2Error, match=r"SHA-256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        source.check_archive(flipped)
    with pytest.raises(PT2Error, match="cannot read the source archive"):
        source.check_archive(tmp_path / "none.tar.gz")


@pytest.mark.parametrize("form", ["archive", "package", "llama.cpp"])
def test_every_form_of_source_gives_the_same_tree(tmp_path: Path, pin: Path, form: str) -> None:
    given = {"archive": pin, "llama.cpp": tmp_path / "tree", "package": tmp_path / "package"}[form]
    write_tree(tmp_path / "package" / "vendor" / "llama.cpp")
    dest = tmp_path / "cache" / "pristine"
    source.make_pristine(dest, given)
    source.check_tree(dest)
    assert source.needed_files(dest) == sorted(NEEDED)
    assert [p.name for p in dest.parent.iterdir()] == ["pristine"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (t / "ggml/src/ggml.c").write_bytes(b"int other;\n"), "ggml differs"),
        (lambda t: (t / "ggml/src/new.c").write_bytes(b"new"), "ggml differs"),
        (lambda t: (t / "ggml/src/ggml.c").unlink(), "ggml differs"),
        (lambda t: (t / "tools/ui/CMakeLists.txt").unlink(), "tools is missing"),
        (lambda t: (t / source.PATCH_STAMP).write_text("{}"), "already patched"),
    ],
)
def test_changed_folders_are_refused_by_name(tmp_path: Path, pin: Path, change, message) -> None:
    change(tmp_path / "tree")
    with pytest.raises(PT2Error, match=message):
        source.make_pristine(tmp_path / "pristine", tmp_path / "tree")
    assert not (tmp_path / "pristine").exists()


def test_source_must_be_there_and_be_llama_cpp(tmp_path: Path) -> None:
    with pytest.raises(PT2Error, match="does not exist"):
        source.check_given(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PT2Error, match="neither an unpacked"):
        source.check_given(tmp_path / "empty")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("No module named pip", "has no pip: run .* -m ensurepip"),
        ("WARNING: Retrying\nNewConnectionError: Name or service not known", "no network"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "another file than the pinned"),
        ("Looking in indexes\nERROR: No matching distribution\n", "No matching distribution"),
        ("", "pip could not fetch"),
    ],
)
def test_download_failures_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: str, message: str
) -> None:
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{log}\nEND\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    (tmp_path / "work").mkdir()
    with pytest.raises(PT2Error, match=message):
        source.download(tmp_path / "work")
