"""pt2-llama bindings: a wheel of Python files from the archive, installed once."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pt2_llama import bindings, builds, cli, pinned, source
from pt2_llama.cache import Places
from pt2_llama.wheel import WHEEL, make_wheel

PACKAGE = {
    "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {pinned.VERSION}\n",
    "LICENSE.md": "MIT\n",
    "llama_cpp/__init__.py": f'__version__ = "{pinned.VERSION}"\nllama_print_system_info = str\n',
    "llama_cpp/server/app.py": "pass\n",
    "vendor/llama.cpp/CMakeLists.txt": "project(x)\n",
    "examples/llama_cpp/no.py": "pass\n",
    "llama_cpp/../../evil.py": "pass\n",
}


def write_archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"llama_cpp_python-{pinned.VERSION}/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.fixture
def archive(tmp_path, monkeypatch) -> Path:
    """A small archive that is the pinned one for the time of a test."""
    file = write_archive(tmp_path / pinned.SDIST_NAME, PACKAGE)
    monkeypatch.setattr(pinned, "SDIST_BYTES", file.stat().st_size)
    monkeypatch.setattr(pinned, "SDIST_SHA256", source.sha256_file(file))
    return file


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip and for the process that loads the library; its calls are kept."""
    made: list[list[str]] = []

    def run(argv, **kwargs):
        made.append(argv)
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(bindings.children, "run", run)
    return made


def installed(monkeypatch, version: str | None) -> None:
    monkeypatch.setattr(bindings, "installed_version", lambda: version)


def test_pip_installs_the_wheel_and_python_imports_it(tmp_path, archive):
    wheel = make_wheel(archive, tmp_path)
    assert wheel is not None and wheel.name == WHEEL
    target = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(target)]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", *options]
    subprocess.run([*pip, str(wheel)], check=True)
    files = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert {f for f in files if ".dist-info" not in f} == {
        "llama_cpp/__init__.py", "llama_cpp/server/app.py",
    }  # fmt: skip
    ask = "import llama_cpp, importlib.metadata as m; print(m.version('llama-cpp-python'))"
    done = subprocess.run(
        [sys.executable, "-c", ask], env={"PYTHONPATH": str(target)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == pinned.VERSION
    assert make_wheel(write_archive(tmp_path / "x.tar.gz", {"PKG-INFO": "x"}), tmp_path) is None


def test_they_are_installed_once(where: Places, archive, pip, monkeypatch, capsys):
    installed(monkeypatch, None)
    assert cli.main(["bindings", "--source", str(archive)]) == 0
    assert pip[0][-1] == str(where.root / WHEEL) and "install" in pip[0]
    said = capsys.readouterr().err
    assert "is installed in" in said and "they need our library: pt2-llama build" in said
    installed(monkeypatch, pinned.VERSION)
    pip.clear()
    assert cli.main(["bindings"]) == 0
    assert pip == [] and "nothing to do" in capsys.readouterr().err
    assert cli.main(["bindings", "--force"]) == 0  # from the wheel that is there: no download
    assert "--force-reinstall" in pip[0]


def test_another_version_is_replaced_only_when_asked(
    where: Places, archive, pip, monkeypatch, capsys
):
    installed(monkeypatch, "0.2.1")
    assert cli.main(["bindings", "--source", str(archive)]) == 2
    said = capsys.readouterr().err
    assert "0.2.1 is installed" in said and said.endswith("with: pt2-llama bindings --force\n")
    assert pip == []
    assert cli.main(["bindings", "--source", str(archive), "--force"]) == 0 and pip


def test_what_pip_says_and_a_library_that_does_not_load_are_one_line(
    where: Places, archive, pip, monkeypatch, capsys
):
    installed(monkeypatch, None)
    answers = iter([(1, "ERROR: externally-managed-environment")])

    def run(argv, **kwargs):
        status, text = next(answers)
        return subprocess.CompletedProcess(argv, status, "", text)

    monkeypatch.setattr(bindings.children, "run", run)
    assert cli.main(["bindings", "--source", str(archive)]) == 2
    said = capsys.readouterr().err
    assert "pip could not install" in said and "externally-managed-environment" in said
    assert said.count("error:") == 1

    class NoLibrary:
        bin_dir = where.root

        def env(self) -> dict[str, str]:
            return {}

    monkeypatch.setattr(builds, "find_build", lambda *args: NoLibrary())
    answers = iter([(0, ""), (1, "Traceback\nOSError: no libllama.so")])
    assert cli.main(["bindings"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "do not load our library (OSError: no libllama.so)" in said


def test_only_the_pinned_archive_is_taken(
    where: Places, archive, tmp_path, pip, monkeypatch, capsys
):
    installed(monkeypatch, None)
    archive.write_bytes(archive.read_bytes()[:-1] + b"x")
    for given in (archive, tmp_path):
        assert cli.main(["bindings", "--source", str(given)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert pip == [] and not (where.root / WHEEL).exists()


def test_a_build_installs_them_beside_it_where_it_can(where: Places, archive, monkeypatch, capsys):
    pip: list[list[str]] = []
    status = 0
    run = bindings.children.run

    def stand_in(argv, **kwargs):
        if "pip" not in argv and "import llama_cpp" not in argv[-1]:
            return run(argv, **kwargs)
        pip.append(argv)
        return subprocess.CompletedProcess(
            argv, status, "", "ERROR: externally-managed-environment"
        )

    monkeypatch.setattr(bindings.children, "run", stand_in)
    installed(monkeypatch, None)
    assert cli.main(["build"]) == 0
    assert "bindings are left as they are (the source was given" in capsys.readouterr().err
    assert make_wheel(archive, where.root) is not None
    assert cli.main(["build", "--no-bindings"]) == 0
    assert pip == []
    assert cli.main(["build"]) == 0
    assert pip[0][-1] == str(where.root / WHEEL)
    assert f"{pinned.VERSION} (the bindings alone) is installed" in capsys.readouterr().err
    installed(monkeypatch, "0.2.1")
    assert cli.main(["build"]) == 0, "another version stays, and the build is of use without"
    assert "as they are (0.2.1 is installed in" in capsys.readouterr().err
    installed(monkeypatch, None)
    status = 1
    assert cli.main(["build"]) == 0
    assert "as they are (pip could not install" in capsys.readouterr().err
