"""The unmodified source: fetch with pip, check against the pins, unpack only what is needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, sha256_file
from pt2_core.process import children
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import open_reporter
from pt2_llama import pinned
from pt2_llama.wheel import make_wheel

PATCH_STAMP = ".pt2-overlay.json"
TEMPORARY = ".source-"  # begins the name of the folder that a source is fetched and unpacked in

# pip insists on the metadata of what it downloads, and for a source package it gets them by
# installing a build system and running the package's own build code: most of a minute, and before
# anybody has checked the archive. This stand-in answers with the two facts pip compares.
_STAND_IN_BACKEND = """\
import pathlib


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder) / "llama_cpp_python-VERSION.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: VERSION\\n"
    )
    return info.name


def build_wheel(*args, **kwargs):
    raise RuntimeError("this stand-in only names the package")
"""


def is_needed(path: str) -> bool:
    """Whether a file of llama.cpp (relative, with forward slashes) is part of what we unpack."""
    if path in pinned.KEEP_FILES:
        return True
    parts = PurePosixPath(path).parts
    if len(parts) < 2 or parts[0] not in pinned.KEEP_FOLDERS:
        return False
    if any(part.startswith(".") or part == "__pycache__" for part in parts):
        return False
    if any(path.startswith(f"{folder}/") for folder in pinned.DROP_FOLDERS):
        return False
    if parts[:2] == ("ggml", "src") and len(parts) > 3:
        return parts[2] in pinned.KEEP_BACKENDS
    return True


def needed_files(root: Path) -> list[str]:
    """The needed files below ``root``, sorted, with forward slashes."""
    found = []
    for folder, _, names in os.walk(root):
        base = Path(folder).relative_to(root)
        found += [p for name in names if is_needed(p := (base / name).as_posix())]
    return sorted(found)


def tree_digests(root: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 per top-level folder over the sorted (path, SHA-256 of the content) pairs."""
    groups: dict[str, hashlib._Hash] = {}
    for path in sorted(files):
        top = path.split("/")[0] if "/" in path else "."
        digest = groups.setdefault(top, hashlib.sha256())
        digest.update(f"{path}\0{sha256_file(root / path)}\n".encode())
    return {top: digest.hexdigest() for top, digest in groups.items()}


def check_tree(root: Path, expected: dict[str, str] | None = None) -> None:
    """Compare a source tree's needed files with the pinned digests.

    Raises:
        PT2Error: the folders that are missing or differ, by name.
    """
    expected = pinned.TREE_SHA256 if expected is None else expected
    if (root / PATCH_STAMP).exists():
        raise PT2Error(
            f"{root} is already patched ({PATCH_STAMP} is there); give the unmodified source"
        )
    actual = tree_digests(root, needed_files(root))
    missing = sorted(set(expected) - set(actual))
    differ = sorted(top for top in expected if top in actual and actual[top] != expected[top])
    if missing or differ:
        what = [f"{t} is missing" for t in missing] + [f"{t} differs" for t in differ]
        raise PT2Error(
            f"{root} is not the llama.cpp {pinned.LLAMA_COMMIT} of {pinned.PACKAGE}=="
            f"{pinned.VERSION} ({', '.join(what)}); leave out --source to fetch it"
        )


def check_archive(path: Path) -> None:
    """Compare an archive with the pinned size and SHA-256.

    Raises:
        PT2Error: it is shorter (probably cut off) or another file.
    """
    try:
        size = path.stat().st_size
    except OSError as e:
        raise PT2Error(f"cannot read the source archive {path}: {e.strerror}") from e
    if size < pinned.SDIST_BYTES:
        raise PT2Error(
            f"{path} is cut off or another file ({size} of {pinned.SDIST_BYTES} bytes); "
            f"download {pinned.SDIST_NAME} again"
        )
    if (actual := sha256_file(path)) != pinned.SDIST_SHA256:
        raise PT2Error(
            f"{path} is not {pinned.SDIST_NAME}: SHA-256 {actual}, expected {pinned.SDIST_SHA256}"
        )


def unpack(
    archive: Path,
    dest: Path,
    progress: Callable[[int], None] | None = None,
    prefix: str = pinned.SDIST_PREFIX,
) -> int:
    """Unpack the needed regular files of a source archive into the new folder ``dest``.

    ``progress`` is called with the number of files written so far. Returns that number. ``prefix``
    is the folder of llama.cpp in the archive.

    Raises:
        PT2Error: a member leaves the folder, a needed member is not a regular file, or the archive
            is damaged.
    """
    count = 0
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise PT2Error(f"{archive}: unsafe member {member.name!r}; nothing was used")
                if not member.name.startswith(prefix):
                    continue
                path = member.name[len(prefix) :]
                if member.isdir() or not is_needed(path):
                    continue
                if not member.isreg():
                    raise PT2Error(f"{archive}: {member.name!r} is a link or device, not a file")
                _write_member(tar, member, dest / path)
                count += 1
                if progress:
                    progress(count)
    except (tarfile.TarError, EOFError, OSError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise PT2Error(f"cannot unpack into {dest}: {e.strerror}") from e
        raise PT2Error(f"{archive} is damaged ({e}); download it again") from e
    return count


def _write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    assert source is not None, "a regular file can always be opened"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as f:
        shutil.copyfileobj(source, f)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)


def download(folder: Path) -> Path:
    """Let pip fetch the pinned source archive into ``folder``; returns the checked file.

    Raises:
        PT2Error: as :func:`fetch`, or the archive is not the pinned one.
    """
    archive = fetch(folder, pinned.VERSION, pinned.SDIST_SHA256)
    check_archive(archive)
    return archive


def fetch(folder: Path, version: str, sha256: str | None = None) -> Path:
    """Let pip fetch the source archive of a version into ``folder``.

    pip is used because it knows the user's indexes, proxies and credentials.

    Args:
        sha256: what pip shall insist on; None takes what the index has.

    Raises:
        PT2Error: pip is missing, there is no network, or there is no such archive.
    """
    stub = folder / "stand-in" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build.py").write_text(_STAND_IN_BACKEND.replace("VERSION", version))
    requirements = folder / "requirements.txt"
    wanted = f"--hash=sha256:{sha256}" if sha256 else ""
    requirements.write_text(f"{pinned.PACKAGE}=={version} {wanted}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-cache-dir"]
    args = ["--no-deps", "--no-build-isolation", "--no-binary", pinned.PACKAGE]
    tmp = folder / "tmp"
    tmp.mkdir()
    env = os.environ | {"TMPDIR": str(tmp), "PYTHONPATH": str(stub.parent)}
    command = [*pip, *args, "--dest", str(folder), "-r", str(requirements)]
    name = pinned.sdist_name(version)
    size = pinned.SDIST_BYTES if version == pinned.VERSION else None
    with open_reporter().phase(f"fetching {name}", size, "bytes", every=5) as bar:
        status, log = _run_watched(command, env, lambda: bar.reach(_largest_file(tmp)))
        if status != 0 or not (folder / name).is_file():
            raise PT2Error(explain_pip(log, version=version))
    return folder / name


def _run_watched(
    command: list[str], env: dict[str, str], tick: Callable[[], None]
) -> tuple[int, str]:
    with children.child(
        command, env=env, tree=True, stdout=children.PIPE, stderr=children.STDOUT, text=True
    ) as process:
        lines: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(0.2)
            tick()
        return process.wait(), "".join(lines)


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(base) / name).stat().st_size)
            except OSError:
                continue  # pip moves and removes its files while we look
    return max(sizes)


def explain_pip(
    log: str,
    doing: str = "fetch",
    by_hand: str = f", or fetch {pinned.SDIST_NAME} elsewhere and give it with --source",
    version: str = pinned.VERSION,
    what: str = "",
) -> str:
    """One line about why pip failed, from what it printed.

    Args:
        what: another package than llama-cpp-python, as ``name==version``.
    """
    if "No module named pip" in log:
        ensure = command(sys.executable, "-m", "ensurepip")
        return f"this Python has no pip: run {ensure}{by_hand}"
    if "No space left" in log:
        return "the disk is full; free about 500 MB, or set PT2_CACHE to a larger disk"
    network = ("NameResolution", "Name or service", "Connection", "timed out", "Max retries")
    if any(sign in log for sign in network):
        return f"no network: pip could not reach the package index; connect{by_hand}"
    if "DO NOT MATCH THE HASHES" in log:
        return f"the package index gave another file than the pinned {what or pinned.SDIST_NAME}"
    lines = [line for line in log.splitlines() if line.strip()]
    last = next((x for x in reversed(lines) if x.startswith("ERROR")), lines[-1] if lines else "")
    package = what or f"{pinned.PACKAGE}=={version}"
    return f"pip could not {doing} {package} ({last.strip()}){by_hand}"


def locate(source: Path) -> Path:
    """The llama.cpp root for a ``--source`` folder: itself, or ``vendor/llama.cpp`` in it.

    Raises:
        PT2Error: neither is there.
    """
    for root in (source / "vendor" / "llama.cpp", source):
        if (root / "ggml" / "CMakeLists.txt").is_file():
            return root
    raise PT2Error(
        f"--source {source} is neither an unpacked {pinned.PACKAGE}=={pinned.VERSION} "
        "nor a llama.cpp folder"
    )


def check_given(given: Path) -> None:
    """Check what ``--source`` names: an archive, an unpacked package, or a llama.cpp folder.

    Raises:
        PT2Error: it is missing, or not the pinned source.
    """
    if not given.exists():
        raise PT2Error(f"--source {given} does not exist")
    if given.is_dir():
        check_tree(locate(given))
    else:
        check_archive(given)


def make_pristine(dest: Path, source: Path | None = None) -> None:
    """Put the needed, checked, unmodified files at ``dest`` (replaced as a whole).

    Args:
        dest: the folder that appears when everything has been checked.
        source: None to download; else the archive, the unpacked package, or a llama.cpp folder.

    Raises:
        PT2Error: as :func:`download`, :func:`check_given`, :func:`unpack`.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(dest.parent, TEMPORARY) as tmp:
        tree = tmp / "tree"
        if source is not None:
            check_given(source)
        if source is not None and source.is_dir():
            root = locate(source)
            for path in needed_files(root):
                (tree / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / path, tree / path)
        else:
            (tmp / "download").mkdir()
            archive = source or download(tmp / "download")
            with open_reporter().phase("unpacking", unit="files") as bar:
                unpack(archive, tree, bar.reach)
            check_tree(tree)
            # The archive goes, so the bindings that it holds are kept now.
            make_wheel(archive, dest.parent)
        if dest.exists():
            shutil.rmtree(dest)
        os.replace(tree, dest)


def describe_pin() -> str:
    """One line about the pinned source, for help texts and reports."""
    size = human_bytes(pinned.SDIST_BYTES)
    return f"{pinned.PACKAGE}=={pinned.VERSION} (llama.cpp {pinned.LLAMA_COMMIT}, {size})"
