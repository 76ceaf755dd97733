"""CMake and Ninja where a machine has none: fetched once by pip, kept in the cache, and used."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest
from pt2_llama_support import FAKE_CMAKE, calls

from pt2_core.errors import PT2Error
from pt2_llama import cli, pinned, programs, toolchain
from pt2_llama.build import Options, build
from pt2_llama.cache import Places
from pt2_llama.doctor import tool_findings


def write_wheel(folder: Path, name: str, version: str, program: str, text: str) -> Path:
    """A wheel as the index has it: the program inside of the package, or among its scripts."""
    info = f"{name}-{version}.dist-info"
    files = {
        program: text,
        f"{name}/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as out:
        for file, content in files.items():
            entry = zipfile.ZipInfo(file)
            entry.external_attr = 0o100755 << 16  # pip wants it to be a regular file
            out.writestr(entry, content)
    return path


@pytest.fixture
def bare(where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a compiler alone; the index is a folder with two small wheels."""
    machine = tmp_path / "programs"
    (machine / "cmake").unlink()
    (machine / "ninja").unlink()
    for name in ("sh", "cat", "ln", "mkdir", "chmod", "basename", "sleep"):
        (machine / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(machine))
    index = tmp_path / "index"
    index.mkdir()
    ninja = "#!/bin/sh\necho 1.13.0\n"
    wheels = {
        "cmake": write_wheel(index, "cmake", "3.31.10", "cmake/data/bin/cmake", FAKE_CMAKE),
        "ninja": write_wheel(index, "ninja", "1.13.0", "ninja-1.13.0.data/scripts/ninja", ninja),
    }
    monkeypatch.setattr(
        pinned, "BUILD_PROGRAMS",
        {
            name: (version, (hashlib.sha256(wheels[name].read_bytes()).hexdigest(),))
            for name, (version, _) in pinned.BUILD_PROGRAMS.items()
        },
    )  # fmt: skip
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def test_a_compiler_is_all_that_a_machine_needs(where: Places, bare: Path, capsys) -> None:
    assert [f.value for f in tool_findings(where) if f.name in ("cmake", "ninja")] == ["no", "no"]
    assert cli.main(["build"]) == 0
    said = capsys.readouterr().err
    assert "fetching cmake 3.31.10" in said and "fetching ninja 1.13.0" in said
    own = programs.fetched(where)
    assert all(path.is_file() for path in own.values())
    configured = next(line for line in calls(where) if line.startswith("-S"))
    assert f"-DCMAKE_MAKE_PROGRAM={own['ninja']}" in configured and " Ninja " in configured
    # The second time there is nothing to fetch: it works without an index.
    shutil.rmtree(bare)
    build(Options(force=True), where)
    assert [f.state for f in tool_findings(where) if f.name in ("cmake", "ninja")] == ["ok", "ok"]
    assert "fetching" not in capsys.readouterr().err
    assert cli.main(["clean", "--all"]) == 0
    assert not where.programs.exists()


def test_what_the_machine_has_is_taken_first(where: Places, bare: Path, tmp_path: Path) -> None:
    machine = tmp_path / "programs"
    for name, text in {"cmake": FAKE_CMAKE, "make": "#!/bin/sh\n"}.items():
        (machine / name).write_text(text)
        (machine / name).chmod(0o755)
    assert programs.missing(where) == [], "make does in the place of ninja"
    made = build(Options(), where)
    assert not where.programs.exists()
    assert "Unix Makefiles" in next(line for line in calls(where) if line.startswith("-S"))
    # CMake refuses a folder that it has configured for make, so ninja gets one of its own.
    (machine / "ninja").write_text("#!/bin/sh\n")
    (machine / "ninja").chmod(0o755)
    build(Options(force=True), where)
    assert len(list(where.objects.iterdir())) == 2
    assert made.folder.is_dir()


def test_a_cmake_that_is_too_old_is_passed_over(
    where: Places, bare: Path, tmp_path: Path, capsys
) -> None:
    old = tmp_path / "programs" / "cmake"
    old.write_text("#!/bin/sh\necho cmake version 3.10.2\n")
    old.chmod(0o755)
    assert programs.missing(where) == ["cmake", "ninja"]
    build(Options(), where)
    own = programs.fetched(where)["cmake"]
    assert toolchain.find_cmake(own) == str(own)


def test_no_compiler_no_index_and_a_foreign_file_are_one_line(
    where: Places, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    wheel = next(bare.glob("cmake*"))
    content = wheel.read_bytes()
    wheel.write_bytes(content + b"x")
    assert cli.main(["build"]) == 2
    assert "gave another file than the pinned cmake==3.31.10" in capsys.readouterr().err
    wheel.unlink()
    assert cli.main(["build"]) == 2
    said = capsys.readouterr().err
    assert "pip could not fetch cmake==3.31.10" in said and said.count("error: ") == 1
    assert "apt install cmake ninja-build" in said and not where.programs.exists()
    (tmp_path / "programs" / "c++").unlink()
    with pytest.raises(PT2Error, match=r"no C\+\+ compiler"):
        build(Options(), where)
    assert not any(where.root.glob(".source-*"))


def test_pip_installs_beside_this_python_count(
    where: Places, bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment whose programs are called by their path is not on PATH."""
    monkeypatch.undo()
    scripts = tmp_path / "venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("cmake", "ninja"):
        (scripts / name).write_text("#!/bin/sh\necho cmake version 3.31.10\n")
        (scripts / name).chmod(0o755)
    monkeypatch.setattr(toolchain.sysconfig, "get_path", lambda name: str(scripts))
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    assert toolchain.find_cmake() == str(scripts / "cmake")
    assert toolchain.find_ninja() == str(scripts / "ninja")
