"""Builds that fail, are killed or meet another one: an explanation, and never half a build."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pt2_llama_support import calls, command_line

from pt2_core.errors import PT2Error
from pt2_llama import build as build_module
from pt2_llama import builds, cli, pinned, source, toolchain
from pt2_llama.build import Options, build
from pt2_llama.cache import Places, lock


@pytest.mark.parametrize(
    ("mode", "message", "shown"),
    [
        ("configure", "configuring llama.cpp failed: CMake finds no working C", "CMAKE_CXX"),
        ("disk", "the disk is full", "No space left"),
        ("memory", "ran out of memory; use fewer --jobs", "Killed"),
        ("code", "compiling llama.cpp failed: see the lines above", "unknown type name 'foo'"),
        ("forgets", "the build made no llama-cli", ""),
        ("crash", "smoke test failed: llama-perplexity of F16: stopped by SIGILL", ""),
    ],
)
def test_failures_are_explained_and_leave_no_build(
    where: Places, monkeypatch: pytest.MonkeyPatch, capfd, mode: str, message: str, shown: str
) -> None:
    monkeypatch.setenv("MODE", mode)
    assert cli.main(["build"]) == 2
    error = capfd.readouterr().err
    assert message in error and shown in error
    assert error.splitlines()[-1].startswith("pt2-llama: error: ")
    if shown:
        assert "the whole log is " in error
        assert shown in next(where.objects.iterdir()).joinpath("build.log").read_text()
    assert builds.all_builds(where) == [] and list(where.builds.iterdir()) == []
    monkeypatch.setenv("MODE", "")
    assert cli.main(["build"]) == 0


def test_wrong_figures_fail_the_smoke_test(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, reason in (("nan", "perplexity nan"), ("inf", "inf"), ("0.5", "perplexity 0.5")):
        monkeypatch.setenv("PPL", value)
        with pytest.raises(PT2Error, match=reason):
            build(Options(), where)
    monkeypatch.setenv("PPL", "no figure")
    with pytest.raises(PT2Error, match="printed no perplexity"):
        build(Options(), where)


def test_missing_programs_are_named_with_the_remedy(
    where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: None)
    with pytest.raises(PT2Error, match=r"--cuda needs nvcc"):
        toolchain.find_toolchain(cuda=True)
    (programs / "ninja").unlink()
    with pytest.raises(PT2Error, match="neither ninja nor make"):
        toolchain.find_toolchain()
    (programs / "cmake").unlink()
    with pytest.raises(PT2Error, match="cmake is missing: apt install cmake"):
        toolchain.find_toolchain()
    (programs / "c++").unlink()
    with pytest.raises(PT2Error, match=r"no C\+\+ compiler: apt install build-essential"):
        toolchain.find_toolchain()


def test_old_cmake_is_refused(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_VERSION", "3.10.2")
    with pytest.raises(PT2Error, match=r"cmake 3\.18 or newer is needed, .* is 3\.10\.2"):
        toolchain.find_toolchain()


def test_full_disk_is_noticed_before_compiling(
    where: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(build_module.DISK_BYTES, "cpu", 1 << 60)
    with pytest.raises(PT2Error, match=r"GB free, a cpu build needs about .* PT2_CACHE"):
        build(Options(), where)
    assert calls(where) == []


def test_changed_cached_source_is_not_built(
    where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (where.pristine / "ggml/include/ggml.h").write_text("tampered")
    fetched = []
    monkeypatch.setattr(source, "make_pristine", lambda *args: fetched.append(args))
    build_module.ensure_pristine(where)
    assert fetched == [(where.pristine, None)]
    with pytest.raises(PT2Error, match="does not exist"):
        build(Options(source=tmp_path / "none.tar.gz"), where)


# -- stopped from outside ------------------------------------------------------------------------


def test_a_killed_build_is_never_taken_for_a_result(where: Places) -> None:
    program = f"""
import sys; from pathlib import Path
from pt2_llama import pinned
from pt2_llama.build import Options, build
from pt2_llama.cache import Places
pinned.TREE_SHA256 = {pinned.TREE_SHA256!r}
build(Options(), Places(Path({str(where.root)!r}), Path({str(where.overlay)!r})))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {"MODE": "hang"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: any(c.startswith("--build") for c in calls(where)))
    finally:
        os.killpg(process.pid, 9)
        process.wait()
    assert builds.find_build(where, "cpu") is None
    made = build(Options(wait=False), where)
    assert builds.find_build(where, "cpu") == made
    assert [f.name for f in where.builds.iterdir()] == [made.folder.name], "leftovers are removed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_build_stops_its_compilers(where: Places, tmp_path: Path, number) -> None:
    cmake = tmp_path / "programs" / "cmake"
    cmake.write_text(cmake.read_text().replace("hang) sleep 60", "hang) echo $$ > $PID; sleep 60"))
    pid = tmp_path / "pid"
    command = command_line(where, "build")
    env = os.environ | {"MODE": "hang", "PID": str(pid)}
    # A test run in the background hands down an ignored SIGINT; a user's terminal does not.
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (1, 2, 15)],
    )  # fmt: skip
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    group = os.getpgid(int(pid.read_text()))
    assert running_in_group(group), "the compilers run in a group of their own"
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    if number != signal.SIGKILL:  # of which the compilers are told by the system
        assert process.returncode == 128 + number
        assert f"pt2-llama: interrupted by {number.name}" in error.splitlines()[-1]
    wait_until(lambda: running_in_group(group) == [])


def running_in_group(group: int) -> list[str]:
    """Processes of a group that are not just waiting to be reaped."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = stat.read_text().rsplit(")", 1)
        except OSError:
            continue  # it ended while we looked
        state, _, pgid = fields.split()[:3]
        if int(pgid) == group and state != "Z":
            found.append(name)
    return found


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition never came true"
        time.sleep(0.02)


# -- the lock ------------------------------------------------------------------------------------


def _hold(root: Path, ready, release) -> None:
    with lock(Places(root, root), "build of the cpu variant"):
        ready.set()
        release.wait(30)


def test_two_builds_do_not_run_at_once(where: Places, capfd) -> None:
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(where.root, ready, release))
    other.start()
    try:
        assert ready.wait(30)
        holder = f"pt2-llama build of the cpu variant, process {other.pid}"
        with pytest.raises(PT2Error, match=holder), lock(where, "mine", wait=False):
            pass
        with pytest.raises(PT2Error, match="in use by"):
            build(Options(wait=False), where)
        release.set()
        with lock(where, "mine"):
            assert other.exitcode is None or other.exitcode == 0
    finally:
        release.set()
        other.join()
    with lock(where, "again", wait=False):
        pass


def test_clean_removes_what_killed_runs_have_left(where: Places, tmp_path: Path) -> None:
    bench = tmp_path / "cache" / "bench"
    for everything in (False, True):
        (where.root / ".source-abc" / "download").mkdir(parents=True)
        (where.builds / ".staged-abc").mkdir(parents=True)
        bench.mkdir(parents=True, exist_ok=True)
        (bench / ".m-bf16.gguf.abc.tmp").write_text("as large as a model")
        (bench / "m-bf16.gguf").write_text("whole")
        builds.clean(where, everything)
        hidden = [p for p in (tmp_path / "cache").rglob(".*") if p.name != ".pt2-overlay.json"]
        assert not hidden and (bench / "m-bf16.gguf").exists()
