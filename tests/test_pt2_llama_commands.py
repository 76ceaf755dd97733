"""The commands run, env, doctor, clean and --help of pt2-llama, with stand-in builds."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from pt2_llama_support import command_line, report, set_overlay

from pt2_core.formats import DEFAULT, SMALLEST
from pt2_llama import cli
from pt2_llama.build import Options, build
from pt2_llama.cache import Places
from pt2_llama.doctor import doctor, tool_findings


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
    assert f"cpu kernels of {DEFAULT.name}, {SMALLEST.name}|ok|avx2 on the CPU|" in report(where)
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
    missing = [f for f in tool_findings(where) if f.state == "missing"]
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
