"""The smoke test of a build, and AMX that faults: what is built for it, and what is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from pt2_llama_support import calls, set_overlay

from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT
from pt2_llama import compile, smoke, toolchain
from pt2_llama.build import Options, build
from pt2_llama.cache import Places


@pytest.mark.parametrize(
    ("status", "name"),
    [
        *[(-11, "SIGSEGV"), (-4, "SIGILL"), (139, "SIGSEGV"), (-7, "SIGBUS"), (-8, "SIGFPE")],
        *[(-6, None), (-9, None), (-15, None), (1, None), (124, None), (200, None)],
    ],
)
def test_only_faults_count_as_crashes(status: int, name: str | None) -> None:
    assert smoke.crash_signal(status) == name


def test_smoke_test_asks_again_when_the_last_line_is_missing() -> None:
    outputs = iter(["[1]5.0,", "[1]5.0,", "Final estimate: PPL = 300.0 +/- 2"])

    def runner(command: Sequence[str], env: Mapping[str, str]) -> smoke.Outcome:
        return smoke.Outcome(0, next(outputs))

    values, failure = smoke.smoke_test(Path("/bin"), {}, ("F16",), runner=runner)
    assert values == {"F16": 300.0} and failure is None


def test_smoke_test_compares_with_f16_and_runs_the_gpu() -> None:
    hidden: list[tuple[bool, bool]] = []

    def runner(command: Sequence[str], env: Mapping[str, str]) -> smoke.Outcome:
        if "perplexity" in command[0]:
            hidden.append(("-ngl" in command, env.get("CUDA_VISIBLE_DEVICES") == ""))
        value = 9000.0 if DEFAULT.name in str(command) else 300.0
        return smoke.Outcome(0, f"Final estimate: PPL = {value}")

    values, failure = smoke.smoke_test(Path("/bin"), {}, ("F16", "Q2_K"), True, runner)
    assert list(values) == ["F16", "F16 gpu", "Q2_K", "Q2_K gpu"] and failure is None
    # without -ngl llama.cpp takes the GPU it sees: the CPU's runs must not see one
    assert hidden == [(False, True), (True, False)] * 2
    _, failure = smoke.smoke_test(Path("/bin"), {}, ("F16", DEFAULT.name), False, runner)
    assert failure is not None and failure.reason == "perplexity 9000.0 where F16 has 300.0"


# -- AMX -----------------------------------------------------------------------------------------


class Machine:
    """Plays compiler and CPU: ``crashes`` says whether a build with (True) AMX crashes."""

    def __init__(self, crashes: Mapping[bool, bool], failure_crashed: bool = True) -> None:
        self.crashes, self.crashed = crashes, failure_crashed
        self.compiled: list[bool] = []
        self.told: list[str] = []

    def run(self, amx: bool) -> bool:
        return smoke.build_until_it_runs(self.compiled.append, self.test, amx, self.told.append)

    def test(self) -> smoke.Failure | None:
        if self.crashes[self.compiled[-1]]:
            return smoke.Failure("llama-perplexity of Q8_0", "stopped by SIGSEGV", self.crashed)
        return None


def test_amx_that_works_is_kept() -> None:
    machine = Machine({True: False, False: False})
    assert machine.run(amx=True) is True
    assert machine.compiled == [True] and machine.told == []


def test_amx_that_faults_is_left_out_and_said() -> None:
    machine = Machine({True: True, False: False})
    assert machine.run(amx=True) is False
    assert machine.compiled == [True, False]
    assert "stopped by SIGSEGV" in machine.told[0] and "without AMX" in machine.told[0]


def test_a_crash_that_is_not_amx_is_an_error() -> None:
    with pytest.raises(PT2Error, match="stopped by SIGSEGV"):
        Machine({True: True, False: True}).run(amx=True)
    machine = Machine({True: True, False: True})
    with pytest.raises(PT2Error, match="smoke test failed"):
        machine.run(amx=False)
    assert machine.compiled == [False]


def test_an_error_that_is_no_crash_does_not_blame_amx() -> None:
    machine = Machine({True: True, False: False}, failure_crashed=False)
    with pytest.raises(PT2Error):
        machine.run(amx=True)
    assert machine.compiled == [True]


def test_a_cpu_with_faulting_amx_is_built_for_and_remembered(
    where: Places, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("HAS_AMX", "1")
    monkeypatch.setenv("MODE", "amx")
    made = build(Options(), where)
    assert made.stamp.amx == "faults"
    assert any("without AMX" in note for note in made.stamp.notes)
    assert "building again without AMX" in capfd.readouterr().err
    assert sum(line.startswith("--build") for line in calls(where)) == 2
    no_amx = next(where.objects.iterdir()) / compile.NO_AMX_FILE
    assert "-U__AMX_INT8__" in no_amx.read_text()

    set_overlay(where, "int tq2;\n")
    build(Options(), where)
    assert "earlier build found that it faults" in capfd.readouterr().err
    assert sum(line.startswith("--build") for line in calls(where)) == 3


def test_amx_switch_reaches_a_real_cmake_both_ways(tmp_path: Path) -> None:
    tree, objects = tmp_path / "tree", tmp_path / "objects"
    (tree / "ggml").mkdir(parents=True)
    begin = "cmake_minimum_required(VERSION 3.18)\n"
    (tree / "CMakeLists.txt").write_text(begin + "project(x NONE)\nadd_subdirectory(ggml)\n")
    (tree / "ggml" / "CMakeLists.txt").write_text(
        "project(ggml NONE)\nget_directory_property(o COMPILE_OPTIONS)\n"
        'file(WRITE "${CMAKE_BINARY_DIR}/options" "${o}")\n'
    )
    tc = toolchain.find_toolchain()
    for amx in (True, False, True):
        flags = compile.amx_flags(objects, amx)
        compile.configure(tc, tree, objects, flags, tmp_path / "log")
        assert ("-U__AMX_INT8__" in (objects / "options").read_text()) is not amx


def test_amx_that_runs_is_noted(where: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAS_AMX", "1")
    assert build(Options(), where).stamp.amx == "on"
    monkeypatch.delenv("HAS_AMX")
    assert build(Options(force=True), where).stamp.amx == "off"
