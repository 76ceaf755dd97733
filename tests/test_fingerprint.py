"""The checksum of a model: what it covers, and that it is computed once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pt2_core.model import fingerprint as module
from pt2_core.model.fingerprint import CACHE, fingerprint


class Model:
    """Two files in a folder, and how many bytes the checksums of them have read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.read = folder, 0
        folder.mkdir(parents=True)
        (folder / "a").write_bytes(b"first")
        (folder / "b").write_bytes(b"second")

    def digest(self, known: dict | None = None) -> str:
        return fingerprint(self.folder, ["a", "b"], known, self._count)[0]

    def _count(self, size: int) -> None:
        self.read += size


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model whose files count as settled, and a cache of its own."""
    monkeypatch.setenv("PT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED_NS", -(1 << 62))
    return Model(tmp_path / "model")


def test_a_model_is_read_once(model):
    first = model.digest()
    assert model.read == 11
    assert model.digest() == first and model.read == 11


@pytest.mark.parametrize("restore_time", [False, True])
def test_a_changed_file_is_read_again(model, restore_time):
    """Even one of the same size whose time was set back: the entry's own time cannot be."""
    first, before = model.digest(), (model.folder / "a").stat()
    (model.folder / "a").write_bytes(b"fir5t")
    if restore_time:
        os.utime(model.folder / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert model.digest() != first and model.read == 22


def test_names_and_sizes_are_part_of_it(model, tmp_path):
    other = Model(tmp_path / "other")
    assert other.digest() == model.digest()
    (other.folder / "a").write_bytes(b"firsts")
    (other.folder / "b").write_bytes(b"econd")
    assert other.digest() != model.digest()


def test_what_has_just_been_written_is_not_remembered(model, monkeypatch):
    """Within one tick of the file system's clock a second change would leave no trace."""
    monkeypatch.setattr(module, "SETTLED_NS", 1 << 62)
    assert model.digest() == model.digest()
    assert model.read == 22


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b'{"KEY": 1}', b'{"KEY": {"state": STATE, "sha256": "ab"}}',
     b'{"KEY": {"state": STATE, "sha256": 5}}', b'{"KEY": {"state": [], "sha256": "HEX"}}'],
)  # fmt: skip
def test_a_damaged_cache_only_costs_the_time(model, tmp_path, content):
    first = model.digest()
    state = json.dumps(module.files_state(model.folder, ["a", "b"])).encode()
    key = str(model.folder.resolve()).encode()
    content = content.replace(b"KEY", key).replace(b"STATE", state).replace(b"HEX", b"0" * 64)
    (tmp_path / "cache" / CACHE).write_bytes(content)
    assert model.digest() == first and model.read == 22


def test_a_cache_that_cannot_be_written_only_costs_the_time(model, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert model.digest() == model.digest()


def test_the_cache_stays_small(model, tmp_path, monkeypatch):
    """Folders that are gone leave it, and the oldest ones beyond a number."""
    monkeypatch.setattr(module, "MOST", 2)
    gone = Model(tmp_path / "gone")
    gone.digest()
    for file in gone.folder.iterdir():
        file.unlink()
    gone.folder.rmdir()
    model.digest()
    others = [Model(tmp_path / f"other-{i}") for i in range(2)]
    for other in others:
        other.digest()
    kept = json.loads((tmp_path / "cache" / CACHE).read_text())
    assert set(kept) == {str(other.folder.resolve()) for other in others}
