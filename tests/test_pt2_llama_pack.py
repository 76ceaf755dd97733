"""pack and unpack: a build moves to another machine whole, or not at all; it need not compile."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from export_support import make_artifact, make_model
from pt2_llama_support import set_overlay

from pt2_core.errors import PT2Error
from pt2_llama import api, builds, cli, portable, toolchain
from pt2_llama import unpack as unpack_module
from pt2_llama.build import Options, build, source_dir
from pt2_llama.cache import Places
from pt2_llama.pack import MANIFEST, pack
from pt2_llama.unpack import unpack
from pt2_llama.wheel import WHEEL

Files = dict[str, tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def packed(where: Places, tmp_path: Path) -> Path:
    """An archive of a stand-in build."""
    build(Options(), where)
    (where.root / WHEEL).write_bytes(b"a wheel")
    return pack(where, "cpu", tmp_path / "pack.tar.gz")


@pytest.fixture
def second(where: Places, tmp_path: Path) -> Places:
    """The empty cache of a second machine with the same version of the package."""
    return Places(tmp_path / "second", where.overlay)


def change(archive: Path, edit: Callable[[Files], None]) -> Path:
    """A copy of an archive whose members were edited."""
    files: Files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            files[member.name] = (member, content.read() if content else b"")
    edit(files)
    out = archive.with_name(f"changed-{len(list(archive.parent.glob('changed-*')))}.tar.gz")
    with tarfile.open(out, "w:gz") as tar:
        for info, content in files.values():
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out


def with_manifest(archive: Path, edit: Callable[[dict], None]) -> Path:
    def apply(files: Files) -> None:
        info, content = files[MANIFEST]
        data = json.loads(content)
        edit(data)
        files[MANIFEST] = (info, json.dumps(data).encode())

    return change(archive, apply)


def test_a_second_machine_finds_build_source_and_bindings(
    where: Places, packed: Path, second: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = builds.require_build(where, "cpu")
    # Another CPU that has all that the first one has.
    monkeypatch.setattr(unpack_module.toolchain, "cpu_signature", lambda: "another")
    monkeypatch.setattr(builds, "cpu_signature", lambda: "another")
    made = unpack(packed, second)
    assert builds.require_build(second, "cpu").folder == made.folder
    assert made.folder.is_relative_to(second.root) and made.stamp.tools == first.stamp.tools
    names = sorted(p.name for p in first.bin_dir.iterdir())
    assert sorted(p.name for p in made.bin_dir.iterdir()) == names
    assert os.readlink(made.bin_dir / "libllama.so") == "libllama.so.0"
    assert os.access(made.bin_dir / "llama-cli", os.X_OK)
    monkeypatch.setattr("pt2_llama.build.ensure_pristine", lambda *args: pytest.fail("fetched"))
    assert (source_dir(second) / "tq.c").read_text() == "int tq;\n"
    assert (second.root / WHEEL).read_bytes() == b"a wheel"
    assert sorted(f.name for f in second.builds.iterdir()) == [made.folder.name]
    assert unpack(packed, second).folder == made.folder, "again: the same"


def test_the_same_build_gives_the_same_bytes(where: Places, packed: Path, tmp_path: Path) -> None:
    os.utime(builds.require_build(where, "cpu").bin_dir / "llama-cli", (0, 0))
    again = pack(where, "cpu", tmp_path / "again.tar.gz")
    assert again.read_bytes() == packed.read_bytes()


def swap(name: str, content: bytes) -> Callable[[Files], None]:
    return lambda files: files.__setitem__(name, (files[name][0], content))


def added(name: str) -> Callable[[Files], None]:
    return lambda files: files.__setitem__(name, (tarfile.TarInfo(name), b"x"))


def relinked(files: Files) -> None:
    files["bin/libllama.so"][0].linkname = "../../../../etc/passwd"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (swap("bin/llama-cli", b"#!/bin/sh\n"), "bin/llama-cli is not the file"),
        (swap("source/tq.c", b"int xx;\n"), "the SHA-256 of source/tq.c is another"),
        (lambda files: files.pop("bin/llama-bench"), "bin/llama-bench is missing"),
        (added("bin/../../evil"), "'bin/../../evil' is not in its list"),
        (relinked, "bin/libllama.so is not the link"),
    ],
)
def test_a_damaged_archive_leaves_nothing(packed: Path, second: Places, edit, words: str) -> None:
    with pytest.raises(PT2Error, match="is damaged, or no archive of pt2-llama pack") as e:
        unpack(change(packed, edit), second)
    assert words in str(e.value)
    assert builds.all_builds(second) == [] and list(second.builds.iterdir()) == []
    assert not second.patched.exists() and not (second.root / WHEEL).exists()


def test_a_list_that_leads_out_of_the_cache_is_refused(packed: Path, second: Places) -> None:
    def edit(files: Files) -> None:
        info, content = files[MANIFEST]
        data = json.loads(content)
        data["files"] = {"../evil": {"sha256": "0" * 64, "size": 1}, **data["files"]}
        rest = {name: entry for name, entry in files.items() if name != MANIFEST}
        files.clear()
        files[MANIFEST] = (info, json.dumps(data).encode())
        files["../evil"] = (tarfile.TarInfo("../evil"), b"x")
        files.update(rest)

    with pytest.raises(PT2Error, match=r"'\.\./evil' leads out of it"):
        unpack(change(packed, edit), second)
    assert not (second.root / "evil").exists() and not (second.builds / "evil").exists()


def test_other_files_are_refused_in_one_line(packed: Path, second: Places, tmp_path: Path) -> None:
    content = packed.read_bytes()
    cases = {
        "cut.tar.gz": (content[: len(content) // 2], "is damaged"),
        "text.tar.gz": (b"not an archive", "is damaged, or no archive"),
        "empty.tar.gz": (b"", "is damaged, or no archive"),
        "zeros.gz": (gzip.compress(bytes(2048)), "no archive of pt2-llama pack"),
    }
    for name, (data, words) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PT2Error, match=words):
            unpack(tmp_path / name, second)
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz") as tar:
        tar.add(packed, "llama.cpp/CMakeLists.txt")
    with pytest.raises(PT2Error, match="its first file is another"):
        unpack(other, second)
    with pytest.raises(PT2Error, match="no such file"):
        unpack(tmp_path / "none.tar.gz", second)
    with pytest.raises(PT2Error, match=r"has the SHA-256 .*: copy it again"):
        unpack(packed, second, sha256="0" * 64)


def test_a_foreign_machine_is_refused_before_anything_is_written(
    packed: Path, second: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(**values) -> Path:
        return with_manifest(packed, lambda data: data["needs"].update(values))

    for archive, words in (
        (needs(machine="riscv64"), "is for Linux on riscv64, and this is"),
        (needs(system="Darwin"), "is for Darwin on"),
        (needs(glibc="9.1"), r"needs glibc 9\.1 or newer, and this machine has"),
        (needs(cpu=["avx512_of_tomorrow"]), r"that this CPU lacks \(avx512_of_tomorrow\)"),
        (with_manifest(packed, lambda d: d.update(version=2)), "is of another format"),
        (with_manifest(packed, lambda d: d["stamp"].pop("key")), "'stamp.key' is missing"),
        (with_manifest(packed, lambda d: d["stamp"].update(source="0")), "another version of this"),
    ):
        with pytest.raises(PT2Error, match=words):
            unpack(archive, second)
    set_overlay(second, "int tq2;\n")
    with pytest.raises(PT2Error, match="another version of this package"):
        unpack(packed, second)
    assert list(second.builds.iterdir()) == []


def test_programs_that_do_not_run_here_are_refused(
    packed: Path, second: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(files: Files) -> None:
        name = "bin/llama-perplexity"
        text = files[name][1].replace(b"#!/bin/sh\n", b"#!/bin/sh\nkill -ILL $$\n")
        info, content = files[MANIFEST]
        data = json.loads(content)
        data["files"][name] |= {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        files[MANIFEST] = (info, json.dumps(data).encode())
        files[name] = (files[name][0], text)

    with pytest.raises(PT2Error, match="do not run here: llama-perplexity of F16: stopped by SIG"):
        unpack(change(packed, edit), second)
    assert builds.all_builds(second) == [] and not second.patched.exists()


def test_the_command(where: Places, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pack"]) == 2
    assert "there is no cpu build" in capsys.readouterr().err
    build(Options(), where)
    assert cli.main(["pack"]) == 0
    name = capsys.readouterr().out.strip()
    assert name.startswith("pt2-llama-cpu-") and Path(name).is_file()
    assert cli.main(["pack", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli.main(["clean", "--all"]) == 0
    assert cli.main(["unpack", name]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert folder == builds.require_build(where, "cpu").bin_dir


# -- what a build needs --------------------------------------------------------------------------


def test_a_native_build_needs_its_cpus_instructions(where: Places) -> None:
    stamp = build(Options(), where).stamp
    flags = ["fpu", "vmx", "hypervisor", "smep", "avx2", "fma", "avx512_vnni", "amx_int8", "pni"]
    assert portable.cpu_features(stamp, flags) == ("avx2", "fma", "avx512_vnni", "pni")
    with_amx = replace(stamp, amx="on")
    assert "amx_int8" in portable.cpu_features(with_amx, flags)
    arm = ["fp", "asimd", "asimddp", "i8mm", "sve2", "evtstrm", "sme", "cpuid"]
    assert portable.cpu_features(stamp, arm) == ("asimd", "asimddp", "i8mm", "sve2", "sme")


def test_a_build_for_any_cpu_needs_what_its_options_say(where: Places) -> None:
    flags = ["avx", "avx2", "avx512f"]
    plain = replace(build(Options(), where).stamp, flags=("-DGGML_NATIVE=ON", "-DGGML_NATIVE=OFF"))
    common = ("avx", "avx2", "bmi2", "f16c", "fma", "sse4_2")
    assert portable.cpu_features(plain, flags) == common
    less = replace(plain, flags=("-DGGML_NATIVE=OFF", "-DGGML_AVX2:BOOL=OFF", "-DGGML_AVX512=ON"))
    assert portable.cpu_features(less, flags) == ("avx", "avx512f", "bmi2", "f16c", "fma", "sse4_2")
    assert portable.cpu_features(plain, ["asimd"]) == ()


def test_the_newest_c_library_is_found_in_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0GLIBC_2.4\0\0GLIBC_2.34\0")
    (tmp_path / "b").write_bytes(b"\0GLIBC_2.17\0 GLIBC_2.99")
    assert portable.newest_glibc(tmp_path) == "2.34"
    (tmp_path / "a").unlink(), (tmp_path / "b").unlink()
    assert portable.newest_glibc(tmp_path) == ""


# -- the real build ------------------------------------------------------------------------------


@pytest.mark.llama
def test_the_real_build_moves_and_exports_and_runs(tmp_path: Path) -> None:
    """A clean cache, no network and no compiler: unpack, export with a proof, generate."""
    api.require_build()
    bare = tmp_path / "bin"
    bare.mkdir()
    env = {
        **os.environ, "PT2_CACHE": str(tmp_path / "cache"), "PATH": f"{bare}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CC": "none", "CXX": "none",
    }  # fmt: skip

    def run(module: str, *args: str | Path, env: dict[str, str] = env) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, args)], env=env, cwd=tmp_path,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    here = {**os.environ, "PYTHONPATH": env.get("PYTHONPATH", "")}
    archive = tmp_path / "pack.tar.gz"
    run("pt2_llama.cli", "pack", "--out", archive, env=here)
    folder = Path(run("pt2_llama.cli", "unpack", "--no-bindings", archive).splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "cache")
    model = make_model(tmp_path / "model")
    artifact = make_artifact(tmp_path / "artifact", model)
    run("export.cli", "model.gguf", "--from", artifact)
    said = run(
        "pt2_llama.cli", "run", "llama-completion", "-m", "model.gguf", "-no-cnv", "-n", "4",
        "-p", "the quick", "-t", "1",
    )  # fmt: skip
    assert "the quick" in said
    libraries = subprocess.run(
        ["ldd", folder / "llama-cli"], env=env, capture_output=True, text=True, check=True
    ).stdout
    ours = [line for line in libraries.splitlines() if "libllama" in line or "libggml" in line]
    assert ours and all(str(folder) in line for line in ours)
    assert toolchain.cpu_signature() == builds.read_build(folder.parent).stamp.cpu
