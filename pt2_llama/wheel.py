"""The bindings of llama-cpp-python as a wheel of Python files alone, made of its source archive."""

from __future__ import annotations

import base64
import hashlib
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from pt2_core.files import atomic_path
from pt2_llama import pinned

WHEEL = f"llama_cpp_python-{pinned.VERSION}-py3-none-any.whl"
_ROOT = f"llama_cpp_python-{pinned.VERSION}/"
_INFO = f"llama_cpp_python-{pinned.VERSION}.dist-info"
_WHEEL_FILE = "Wheel-Version: 1.0\nGenerator: pt2-llama\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def make_wheel(archive: Path, folder: Path) -> Path | None:
    """Pack the bindings of a checked archive as a wheel into ``folder``.

    Returns:
        the wheel; None where the archive has no Python package in it.
    """
    files: dict[str, bytes] = {}
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            path = member.name.removeprefix(_ROOT)
            if path == member.name or ".." in PurePosixPath(path).parts or not member.isreg():
                continue
            kept = {"PKG-INFO": f"{_INFO}/METADATA", "LICENSE.md": f"{_INFO}/licenses/LICENSE.md"}
            target = path if path.startswith("llama_cpp/") else kept.get(path)
            content = tar.extractfile(member) if target else None
            if target and content:
                files[target] = content.read()
    if not {"llama_cpp/__init__.py", f"{_INFO}/METADATA"} <= set(files):
        return None
    files[f"{_INFO}/WHEEL"] = _WHEEL_FILE.encode()
    record = [f"{name},{_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{_INFO}/RECORD"] = "\n".join([*record, f"{_INFO}/RECORD,,", ""]).encode()
    with atomic_path(folder / WHEEL) as tmp, zipfile.ZipFile(tmp, "w") as out:
        for name, data in files.items():
            out.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return folder / WHEEL


def _digest(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=")
    return f"sha256={digest.decode()}"
