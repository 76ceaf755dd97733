"""Building with stand-in compilers: keys, stamps, the lock, failures, AMX, and the commands."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from quantize.common import PT2Error
from third_party.pt2_llama import build as build_module
from third_party.pt2_llama import builds, cli, compile, pinned, smoke, source, toolchain
from third_party.pt2_llama.build import Options, build
from third_party.pt2_llama.builds import Build
from third_party.pt2_llama.cache import Places, lock
from third_party.pt2_llama.doctor import build_findings, doctor, tool_findings

SOURCE = {
    "CMakeLists.txt": "project(x)\n",
    "ggml/CMakeLists.txt": "# ggml\n",
    "ggml/include/ggml.h": "enum { COUNT = 43, };\n",
}

# Plays cmake: "configures" by writing a file, "builds" by writing programs that are shell scripts.
# MODE selects a failure. Every call is noted in the file CALLS.
FAKE_CMAKE = r"""#!/bin/sh
echo "$@" >> "$CALLS"
if [ "$1" = --version ]; then echo "cmake version ${FAKE_VERSION:-3.25.1}"; exit 0; fi
if [ "$1" = -S ]; then
  case "$*" in *no-amx.cmake*) export AMX=off;; *) AMX=on;; esac
  echo "$AMX" > "$4/amx"
  if [ "$MODE" = configure ]; then echo "No CMAKE_CXX_COMPILER could be found."; exit 1; fi
  exit 0
fi
objects=$2; mkdir -p "$objects/bin"; shift 5
case "$MODE" in
  disk) echo "FAILED: x.o"; echo "x.c: error: No space left on device"; exit 1;;
  memory) echo "c++: fatal error: Killed signal terminated program cc1plus"; exit 1;;
  code) echo "tq.c:7:1: error: unknown type name 'foo'"; exit 1;;
  hang) sleep 60;;
esac
i=0
for tool in "$@"; do
  i=$((i+1)); echo "[$i/$#] Linking $tool"
  [ "$MODE" = forgets ] && continue
  cat > "$objects/bin/$tool" <<END
#!/bin/sh
case "\$0" in
*quantize) [ "\$2" = --help ] || : > "\$3"; exit 0;;
*perplexity)
  if [ "$MODE" = amx ] && [ "$(cat "$objects/amx")" = on ]; then kill -SEGV \$\$; fi
  if [ "$MODE" = crash ]; then kill -ILL \$\$; fi
  echo "Final estimate: PPL = ${PPL:-320.5} +/- 1"; exit 0;;
esac
echo "\$(basename "\$0") got \$*"; echo "lib=\$LLAMA_CPP_LIB_PATH"; exit 7
END
  chmod +x "$objects/bin/$tool"
done
echo lib > "$objects/bin/libllama.so.0"; ln -sf libllama.so.0 "$objects/bin/libllama.so"
"""


@pytest.fixture
def where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A cache with a tiny source, an overlay, and a PATH whose cmake is the stand-in."""
    monkeypatch.setenv("PT2_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "cache" / "llama.cpp" / "src"
    places = Places(root=root, overlay=tmp_path / "third_party")
    for path, text in SOURCE.items():
        (places.pristine / path).parent.mkdir(parents=True, exist_ok=True)
        (places.pristine / path).write_text(text)
    digests = source.tree_digests(places.pristine, source.needed_files(places.pristine))
    monkeypatch.setattr(pinned, "TREE_SHA256", digests)
    (places.overlay / "overlay").mkdir(parents=True)
    set_overlay(places, "int tq;\n")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {
        "cmake": FAKE_CMAKE,
        "ninja": "#!/bin/sh\nexit 0\n",
        "cc": '#!/bin/sh\n[ -n "$HAS_AMX" ] && echo "#define __AMX_INT8__ 1"\nexit 0\n',
        "c++": "#!/bin/sh\necho 'c++ 12'\n",
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    for name in ("CC", "CXX", "MODE", "LD_LIBRARY_PATH", "GGML_TQ_CPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "gpus", list)
    monkeypatch.setattr("third_party.pt2_llama.cache.places", lambda: places)
    for module in ("api", "cli"):
        monkeypatch.setattr(f"third_party.pt2_llama.{module}.places", lambda: places)
    return places


def set_overlay(where: Places, text: str) -> None:
    (where.overlay / "overlay" / "tq.c").write_text(text)


def calls(where: Places) -> list[str]:
    path = Path(os.environ["CALLS"])
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line != "--version"]


# -- finding and keys ----------------------------------------------------------------------------


def test_a_build_is_found_only_while_it_matches(where: Places) -> None:
    assert builds.find_build(where, "cpu") is None
    with pytest.raises(PT2Error, match=r"there is no cpu build .* run: pt2-llama build"):
        builds.require_build(where, "cpu")
    made = build(Options(), where)
    assert builds.require_build(where, "cpu").folder == made.folder
    assert builds.find_build(where, "stock") is None

    set_overlay(where, "int tq2;\n")
    assert builds.find_build(where, "cpu") is None
    with pytest.raises(PT2Error, match=r"of an older overlay; run: pt2-llama build again"):
        builds.require_build(where, "cpu")
    set_overlay(where, "int tq;\n")
    assert builds.require_build(where, "cpu").folder == made.folder


def test_a_build_for_another_cpu_does_not_match(
    where: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(Options(), where)
    monkeypatch.setattr(builds, "cpu_signature", lambda: "another")
    with pytest.raises(PT2Error, match="for another CPU"):
        builds.require_build(where, "cpu")


def test_same_content_is_not_built_again_and_a_change_reuses_the_objects(where: Places) -> None:
    first = build(Options(), where)
    done = len(calls(where))
    assert build(Options(), where).folder == first.folder
    assert len(calls(where)) == done

    set_overlay(where, "int tq2;\n")
    second = build(Options(), where)
    assert second.folder != first.folder
    builds_run = [line.split()[1] for line in calls(where) if line.startswith("--build")]
    assert len(builds_run) == 2 and len(set(builds_run)) == 1
    assert first.folder.is_dir(), "an older build stays until there are too many"


def test_force_starts_from_nothing(where: Places) -> None:
    build(Options(), where)
    marker = next(where.objects.iterdir()) / "marker"
    marker.touch()
    build(Options(force=True), where)
    assert not marker.exists()


def test_key_depends_on_everything_that_matters() -> None:
    base = ("overlay", ("-DA=1",), ("tool",), "gcc 12", "cpu")
    others = [
        ("overlay2", *base[1:]),
        (None, *base[1:]),
        (*base[:1], ("-DA=2",), *base[2:]),
        (*base[:2], ("tool", "test"), *base[3:]),
        (*base[:3], "gcc 13", "cpu"),
        (*base[:4], "cpu2"),
    ]
    keys = {builds.build_key(*args) for args in [base, *others]}
    assert len(keys) == len(others) + 1
    assert builds.build_key(*base) == builds.build_key(*base)


def test_options_give_builds_of_their_own(where: Places) -> None:
    plain = build(Options(), where)
    extra = build(Options(cmake_args=("-DGGML_LTO=ON",)), where)
    bare = build(Options(tests=False), where)
    assert len({plain.folder, extra.folder, bare.folder}) == 3
    assert "-DGGML_LTO=ON" in extra.stamp.flags
    with pytest.raises(PT2Error, match=r"has no 'test-backend-ops'; it has llama-cli"):
        bare.tool("test-backend-ops")
    assert builds.require_build(where, "cpu").folder == bare.folder, "the newest that matches"


def test_stock_is_built_from_the_unmodified_source(where: Places) -> None:
    made = build(Options(variant="stock"), where)
    configured = next(line for line in calls(where) if line.startswith("-S"))
    assert configured.split()[1] == str(where.pristine)
    assert made.stamp.overlay is None and "TQ2_1" not in made.stamp.smoke
    set_overlay(where, "other")
    assert builds.require_build(where, "stock").folder == made.folder


def test_work_on_cuda_leaves_builds_for_the_cpu_valid(where: Places) -> None:
    made = build(Options(), where)
    folder = where.overlay / "overlay" / "ggml" / "src" / "ggml-cuda"
    folder.mkdir(parents=True)
    (folder / "tq.cuh").write_text("// new")
    assert builds.find_build(where, "cpu") == made
    (folder.parent / "tq.c").write_text("// new")
    assert builds.find_build(where, "cpu") is None


def test_old_builds_of_a_variant_are_removed(where: Places) -> None:
    stock = build(Options(variant="stock"), where)
    for i in range(builds.KEEP_PER_VARIANT + 2):
        set_overlay(where, f"int tq{i};\n")
        last = build(Options(), where)
    kept = [b.folder for b in builds.all_builds(where)]
    assert len(kept) == builds.KEEP_PER_VARIANT + 1
    assert last.folder in kept and stock.folder in kept


def test_build_has_programs_libraries_and_environment(
    where: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(Options(), where)
    assert made.tool("llama-bench").parent == made.bin_dir
    assert (made.lib_dir / "libllama.so").is_symlink()
    assert (made.lib_dir / "libllama.so").read_text() == "lib\n"
    env = made.env()
    assert env["PATH"].split(":")[0] == str(made.bin_dir)
    assert env["LLAMA_CPP_LIB_PATH"] == str(made.lib_dir)
    assert "LD_LIBRARY_PATH" not in made.exports()
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/other")
    assert made.exports()["LD_LIBRARY_PATH"] == f"{made.lib_dir}:/opt/other"
    (made.bin_dir / "llama-bench").unlink()
    with pytest.raises(PT2Error, match=r"llama-bench is gone; run: pt2-llama build --force"):
        made.tool("llama-bench")
    assert build(Options(), where).tool("llama-bench").exists(), "an incomplete build is redone"


@pytest.mark.parametrize("damage", ["gone", "empty", "list", "version", "field"])
def test_a_damaged_stamp_is_no_build(where: Places, damage: str) -> None:
    stamp = build(Options(), where).folder / builds.STAMP
    data = json.loads(stamp.read_text())
    changed = {
        "empty": "",
        "list": "[]",
        "version": json.dumps(data | {"version": 99}),
        "field": json.dumps({k: v for k, v in data.items() if k != "key"}),
    }
    if damage == "gone":
        stamp.unlink()
    else:
        stamp.write_text(changed[damage])
    assert builds.find_build(where, "cpu") is None
    build(Options(), where)
    assert builds.find_build(where, "cpu") is not None


def test_unknown_variant(where: Places) -> None:
    with pytest.raises(PT2Error, match="unknown build variant 'gpu'; there are cpu, cuda, stock"):
        builds.find_build(where, "gpu")


# -- failures ------------------------------------------------------------------------------------


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
    (programs / "c++").unlink()
    with pytest.raises(PT2Error, match=r"no C\+\+ compiler: apt install build-essential"):
        toolchain.find_toolchain()
    (programs / "ninja").unlink()
    with pytest.raises(PT2Error, match="neither ninja nor make"):
        toolchain.find_toolchain()
    (programs / "cmake").unlink()
    with pytest.raises(PT2Error, match="cmake is missing: apt install cmake"):
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


def test_a_killed_build_is_never_taken_for_a_result(where: Places) -> None:
    program = f"""
import sys; from pathlib import Path
from third_party.pt2_llama import pinned
from third_party.pt2_llama.build import Options, build
from third_party.pt2_llama.cache import Places
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_build_stops_its_compilers(where: Places, tmp_path: Path, number) -> None:
    cmake = tmp_path / "programs" / "cmake"
    cmake.write_text(cmake.read_text().replace("hang) sleep 60", "hang) echo $$ > $PID; sleep 60"))
    pid = tmp_path / "pid"
    command = command_line(where, "build")
    env = os.environ | {"MODE": "hang", "PID": str(pid)}
    # A test run in the background hands down an ignored SIGINT; a user's terminal does not.
    process = subprocess.Popen(
        command, env=env, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )  # fmt: skip
    wait_until(lambda: pid.exists() and pid.read_text().strip())
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "pt2-llama: interrupted" in error
    wait_until(lambda: running_in_group(int(pid.read_text())) == [])


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
        value = 9000.0 if "TQ2_1" in str(command) else 300.0
        return smoke.Outcome(0, f"Final estimate: PPL = {value}")

    values, failure = smoke.smoke_test(Path("/bin"), {}, ("F16", "Q2_K"), True, runner)
    assert list(values) == ["F16", "F16 gpu", "Q2_K", "Q2_K gpu"] and failure is None
    # without -ngl llama.cpp takes the GPU it sees: the CPU's runs must not see one
    assert hidden == [(False, True), (True, False)] * 2
    _, failure = smoke.smoke_test(Path("/bin"), {}, ("F16", "TQ2_1"), False, runner)
    assert failure is not None and failure.reason == "perplexity 9000.0 where F16 has 300.0"


# -- CUDA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ("90", "90a"),  # wgmma is in 90a only
        ("86,90a-real", "86;90a-real"),
        ("90-real,90-virtual,100", "90a-real;90-virtual;100"),
        ("80;90;120", "80;90a;120"),
        ("89", "89"),
    ],
)
def test_cuda_architectures(wanted: str, given: str) -> None:
    assert toolchain.cuda_architectures(wanted) == given


def test_an_unknown_cuda_architecture_is_refused() -> None:
    with pytest.raises(PT2Error, match="expected numbers such as 90"):
        toolchain.cuda_architectures("hopper")


def test_cuda_architecture_comes_from_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H200, 9.0'\necho 'NVIDIA A10, 8.6'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert toolchain.gpus() == [("NVIDIA H200", "90"), ("NVIDIA A10", "86")]
    assert toolchain.cuda_architectures(None) == "86;90a"
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    with pytest.raises(PT2Error, match=r"no GPU is visible .*--cuda-arch 90"):
        toolchain.cuda_architectures(None)


def fake_toolkit(root: Path, cublas: bool) -> str:
    (root / "bin").mkdir(parents=True)
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    if cublas:  # a wrapper elsewhere: where the toolkit is, only nvcc knows
        nvcc.write_text(nvcc.read_text() + f"echo '#$ TOP={root}/lib64/..'\n")
        nvcc = nvcc.rename(root.parent / "nvcc")
    nvcc.chmod(0o755)
    if cublas:
        (root / "include").mkdir()
        (root / "include" / "cublas_v2.h").touch()
        (root / "lib64").mkdir()
        (root / "lib64" / "libcublas.so").touch()
    return str(nvcc)


def test_cublas_of_the_toolkit_then_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toolchain, "_python_cublas_folders", list)
    found = toolchain.find_cublas(fake_toolkit(tmp_path / "with", cublas=True))
    assert found.include is None and "toolkit" in found.origin
    bare = fake_toolkit(tmp_path / "bare", cublas=False)
    with pytest.raises(PT2Error, match="pip install nvidia-cublas"):
        toolchain.find_cublas(bare)
    package = tmp_path / "site" / "nvidia" / "cu13"
    for name in ("include/cublas_v2.h", "lib/libcublas.so.13"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    monkeypatch.setattr(toolchain, "_python_cublas_folders", lambda: [package])
    found = toolchain.find_cublas(bare)
    flags = compile.cuda_flags("90a", bare, found, driver=False)
    assert "-DGGML_CUDA_NO_VMM=ON" in flags
    assert f"-DCUDA_cublas_LIBRARY={package}/lib/libcublas.so.13" in flags
    assert f"-DCMAKE_CUDA_FLAGS=-I{package}/include" in flags


def test_cuda_build_says_where_our_types_run(
    where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    nvcc = fake_toolkit(tmp_path / "cuda", cublas=True)
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: nvcc)
    assert cli.main(["build", "--cuda", "--cuda-arch", "90"]) == 0
    error = capfd.readouterr().err
    assert "TQ2_1 and TQ1_1 have no CUDA kernels yet" in error
    assert "no GPU was visible" in error
    made = builds.require_build(where, "cuda")
    assert "-DGGML_CUDA=ON" in made.stamp.flags and "-DGGML_CUDA_NCCL=OFF" in made.stamp.flags
    assert "TQ2_1 and TQ1_1 have no CUDA kernels" in report(where)

    text = "- {file: ggml/src/ggml-cuda/mmq.cu, anchor: x, replace: y}"
    (where.pristine / "ggml/src/ggml-cuda").mkdir(parents=True)
    (where.pristine / "ggml/src/ggml-cuda/mmq.cu").write_text("x")
    digests = source.tree_digests(where.pristine, source.needed_files(where.pristine))
    monkeypatch.setattr(pinned, "TREE_SHA256", digests)
    (where.overlay / "edits-cuda.yaml").write_text(text)
    assert builds.find_build(where, "cuda") is None
    assert cli.main(["build", "--cuda", "--cuda-arch", "90"]) == 0
    assert "TQ2_1 and TQ1_1 run on the GPU" in capfd.readouterr().err
    assert "TQ2_1 and TQ1_1 run on the GPU" in report(where)
    assert (where.patched / "ggml/src/ggml-cuda/mmq.cu").read_text() == "y"
    assert "have no CUDA kernels" not in report(where)
    assert cli.main(["build", "--cuda-arch", "90"]) == 2
    assert "--cuda-arch needs --cuda" in capfd.readouterr().err


# -- commands ------------------------------------------------------------------------------------


def report(where: Places, ask=lambda b: "avx2 on the CPU") -> str:
    return "\n".join(f"{f.name}|{f.state}|{f.value}|{f.advice}" for f in build_findings(where, ask))


def command_line(where: Places, *args: str) -> list[str]:
    """The command for a process of its own, with the test's cache and source."""
    program = f"""
import sys; from pathlib import Path
from third_party.pt2_llama import api, cli, pinned
from third_party.pt2_llama.cache import Places
pinned.TREE_SHA256 = {pinned.TREE_SHA256!r}
where = Places(Path({str(where.root)!r}), Path({str(where.overlay)!r}))
api.places = cli.places = lambda: where
sys.exit(cli.main(sys.argv[1:]))
"""
    return [sys.executable, "-c", program, *args]


def run_command(where: Places, *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own (``run`` replaces the process)."""
    return subprocess.run(command_line(where, *args), capture_output=True, text=True)


def test_run_passes_arguments_environment_and_exit_status(where: Places) -> None:
    made = build(Options(), where)
    done = run_command(where, "run", "llama-cli", "-m", "model.gguf", "--help", "-p", "two words")
    assert done.returncode == 7
    assert "llama-cli got -m model.gguf --help -p two words" in done.stdout
    assert f"lib={made.lib_dir}" in done.stdout
    unknown = run_command(where, "run", "llama-clii")
    assert unknown.returncode == 2
    assert "has no 'llama-clii'; it has llama-cli, llama-completion" in unknown.stderr
    missing = run_command(where, "run", "--variant", "stock", "llama-cli")
    assert missing.returncode == 2 and "run: pt2-llama build --stock" in missing.stderr


def test_env_is_shell_and_json(where: Places, capfd) -> None:
    assert cli.main(["env"]) == 2
    assert "run: pt2-llama build" in capfd.readouterr().err
    made = build(Options(), where)
    capfd.readouterr()
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["LLAMA_CPP_LIB_PATH"] == str(made.lib_dir)
    assert cli.main(["env"]) == 0
    exports = capfd.readouterr().out
    script = exports + "\ncommand -v llama-bench; echo $LLAMA_CPP_LIB_PATH"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(made.bin_dir / "llama-bench"), str(made.lib_dir)]


def test_doctor_follows_the_state(where: Places, capfd) -> None:
    assert doctor(where) == 1
    assert "not built; run: pt2-llama build" in capfd.readouterr().out
    assert "cpu|missing|not built|run: pt2-llama build" in report(where)
    made = build(Options(), where)
    assert f"cpu|ok|{made.describe()}|" in report(where)
    assert "cpu kernels of TQ2_1, TQ1_1|ok|avx2 on the CPU|" in report(where)
    assert doctor(where) == 1, "the stand-in has no library that tells its kernels"
    set_overlay(where, "other")
    assert "cpu|missing|does not match the current overlay or CPU|run: pt2-llama build" in report(
        where
    )
    capfd.readouterr()
    assert cli.main(["doctor", "--json"]) == 1
    names = {f["name"] for f in json.loads(capfd.readouterr().out)}
    assert {"C++ compiler", "cmake", "CPU", "GPU", "CUDA", "folder", "cpu"} <= names


def test_doctor_names_missing_tools(
    where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "programs" / "c++").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    missing = [f for f in tool_findings() if f.state == "missing"]
    assert [f.advice for f in missing] == [
        "no C++ compiler: apt install build-essential, or set CC and CXX to one"
    ]


def test_clean_keeps_what_is_current(where: Places, capfd) -> None:
    old = build(Options(), where)
    set_overlay(where, "int tq2;\n")
    current = build(Options(), where)
    assert cli.main(["clean"]) == 0
    assert "freed" in capfd.readouterr().out
    assert current.folder.is_dir() and not old.folder.exists() and not where.objects.exists()
    assert where.pristine.is_dir()
    assert cli.main(["clean", "--all"]) == 0
    assert not where.builds.exists() and not where.pristine.exists()


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "pt2-llama run llama-cli -m model.gguf" in capsys.readouterr().out
    assert cli.main(["build", "--jobs", "0"]) == 2
    for wrong in (["bogus"], ["build", "--jobs", "x"], ["build", "--cud"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(wrong)
        assert stop.value.code == 2


def test_steps_of_ninja_and_make() -> None:
    assert compile.parse_step("[12/230] Building CXX object a.o") == (
        12,
        230,
        "Building CXX object a.o",
    )
    assert compile.parse_step("[ 45%] Linking x") == (45, 100, "Linking x")
    assert compile.parse_step("warning: [1/2] x") is None


def test_jobs_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "cpu_count", lambda: 16)
    monkeypatch.setattr(toolchain, "available_memory", lambda: 7_000_000_000)
    assert toolchain.default_jobs("cpu") == 4 and toolchain.default_jobs("cuda") == 2
    monkeypatch.setattr(toolchain, "available_memory", lambda: 100)
    assert toolchain.default_jobs("cpu") == 1


# -- the real build ------------------------------------------------------------------------------


@pytest.mark.llama
def test_the_real_build_runs_every_type() -> None:
    from third_party.pt2_llama import api

    made: Build = api.require_build()
    for kind in (*smoke.STOCK_TYPES, *smoke.OUR_TYPES):
        assert 1 < made.stamp.smoke[kind] < 1e5
    for tool in (*compile.TOOLS, *compile.TEST_TOOLS):
        assert made.tool(tool).is_file()
    command = [str(made.tool("llama-quantize")), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=made.env())
    assert "TQ2_1" in done.stdout + done.stderr


@pytest.mark.llama
def test_the_real_libraries_find_each_other_wherever_they_lie(tmp_path: Path) -> None:
    from third_party.pt2_llama import api

    made = api.require_build()
    shutil.copytree(made.bin_dir, tmp_path / "bin", symlinks=True)
    moved = replace(made, folder=tmp_path)
    env = {"PATH": "/usr/bin:/bin"}
    for tool in made.stamp.tools:
        done = subprocess.run(["ldd", moved.tool(tool)], capture_output=True, text=True, env=env)
        ours = [line for line in done.stdout.splitlines() if "libggml" in line]
        assert ours and all(str(tmp_path) in line for line in ours), done.stdout
