"""What is installed works without the checkout: the wheel, made from the source distribution."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("export", "llamacpp_bench", "pt2_core", "pt2_eval", "pt2_llama", "quantize")
COMMANDS = ("pt2-bench", "pt2-eval", "pt2-export", "pt2-llama", "pt2-quantize", "pt2-refine")
# Run by the installed Python, from a folder that holds nothing.
LOOK = """
import hashlib
from importlib import import_module
from pathlib import Path
from pt2_core.texts.bundled import bundled_file
from pt2_llama.cache import places
for package in {packages}:
    module = import_module(package)
    here = Path(module.__file__).parent
    assert here.parent.name == "site-packages", here
    assert (here / "py.typed").is_file(), here
print(hashlib.sha256(Path(bundled_file("bundled:wiki.test")).read_bytes()).hexdigest())
print(places().overlay)
"""


def call(*argv: object, cwd: Path) -> str:
    """The output of a command that has to succeed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, argv)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(what: str, source: Path, out: Path) -> Path:
    """The sdist or wheel that setuptools, pyproject.toml's build backend, makes of a folder."""
    code = f"import setuptools.build_meta as b; b.build_{what}({str(out)!r})"
    call(sys.executable, "-c", code, cwd=source)
    (made,) = out.glob("*.tar.gz" if what == "sdist" else "*.whl")
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the unpacked source distribution, made from a copy of the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    skip = shutil.ignore_patterns("__pycache__")
    for folder in (*PACKAGES, "third_party", "examples/text"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    sdist = build("sdist", copy, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(unpacked)
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_our_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {n.partition("/")[0] for n in names}
    assert top - {n for n in top if n.endswith(".dist-info")} == set(PACKAGES)
    python = {n for n in names if n.endswith(".py") and "/llama.cpp/" not in n}
    assert python == {
        str(p.relative_to(ROOT))
        for package in PACKAGES
        for p in (ROOT / package).rglob("*.py")
        if "llama.cpp" not in p.parts
    }


def test_an_installed_wheel_finds_its_data_and_commands(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    # The dependencies are those of the Python that runs the tests, behind what is installed here.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps")
    call(*pip, "--no-index", wheel, cwd=tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    digest, overlay = call(
        *(python, "-I", "-c", LOOK.format(packages=PACKAGES)), cwd=empty
    ).splitlines()
    text = (ROOT / "examples/text/wiki.test.txt").read_bytes()
    assert digest == hashlib.sha256(text).hexdigest()
    original = ROOT / "third_party/llama.cpp"
    for path in (p for p in original.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        installed = Path(overlay, path.relative_to(original))
        assert installed.read_bytes() == path.read_bytes(), installed
    for name in COMMANDS:
        shown = call(tmp_path / "env/bin" / name, "--help", cwd=empty)
        assert shown.startswith(f"usage: {name}")
