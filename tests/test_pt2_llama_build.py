"""Builds: keys, stamps, finding them again, steps and jobs with stand-ins; and the real one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from pt2_llama_support import calls, set_overlay

from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT
from pt2_llama import api, builds, compile, smoke, toolchain
from pt2_llama.build import Options, build
from pt2_llama.builds import Build
from pt2_llama.cache import Places

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
    assert made.stamp.overlay is None and DEFAULT.name not in made.stamp.smoke
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


# -- compiling -----------------------------------------------------------------------------------


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
    made: Build = api.require_build()
    for kind in (*smoke.STOCK_TYPES, *smoke.OUR_TYPES):
        assert 1 < made.stamp.smoke[kind] < 1e5
    for tool in (*compile.TOOLS, *compile.TEST_TOOLS):
        assert made.tool(tool).is_file()
    command = [str(made.tool("llama-quantize")), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=made.env())
    assert DEFAULT.name in done.stdout + done.stderr


@pytest.mark.llama
def test_the_real_libraries_find_each_other_wherever_they_lie(tmp_path: Path) -> None:
    made = api.require_build()
    shutil.copytree(made.bin_dir, tmp_path / "bin", symlinks=True)
    moved = replace(made, folder=tmp_path)
    env = {"PATH": "/usr/bin:/bin"}
    for tool in made.stamp.tools:
        done = subprocess.run(["ldd", moved.tool(tool)], capture_output=True, text=True, env=env)
        ours = [line for line in done.stdout.splitlines() if "libggml" in line]
        assert ours and all(str(tmp_path) in line for line in ours), done.stdout
