"""The README's lines for a model of one's own run as they are written, in an empty folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/wiki-llama-7m"
# The programs as their modules, so that this checkout is what runs.
MODULES = {
    "pt2-quantize": "quantize.cli",
    "pt2-export": "export.cli",
    "pt2-llama": "pt2_llama.cli",
    "pt2-eval": "pt2_eval.cli",
    "pt2-bench": "llamacpp_bench.cli",
}
# What makes a line quick; of an option that is given twice the last counts.
QUICK = {
    "pt2-quantize": "--samples 4 --seqlen 64 --device cpu --threads 1",
    "pt2-eval": "--ctx 64 --chunks 1 --device cpu --threads 1",
    "pt2-bench": "-p 8 -n 4 -r 1 -t 1 --chunks 1 --placement none --bandwidth 10 "
    "--imatrix-text short.txt --out bench",
    "pt2-llama run": "-n 8 -t 1",
}


def blocks() -> list[list[str]]:
    """The command lines of each code block under "A model of your own"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("## A model of your own\n")[1].split("\n## ")[0]
    return [
        re.sub(r"\\\n\s*", "", block).strip().splitlines()
        for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S)
    ]


def quick(line: str) -> str:
    words = shlex.split(line, comments=True)
    program = " ".join(words[:2]) if words[0] == "pt2-llama" else words[0]
    return shlex.join([*words, *QUICK.get(program, "").split()])


@pytest.fixture
def shell(tmp_path):
    """Runs a line in an empty folder, with the bundled model in the place of a download."""
    programs, home = tmp_path / "bin", tmp_path / "home"
    programs.mkdir(), home.mkdir()
    scripts = {name: f'exec "{sys.executable}" -m {m} "$@"' for name, m in MODULES.items()}
    scripts["hf"] = f'[ "$1 $3" = "download --local-dir" ] && cp -r "{MODEL}" "$4"'
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)
    (home / "short.txt").write_text((ROOT / "examples/text/calibration.txt").read_text()[:9000])
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(line: str) -> str:
        done = subprocess.run(
            ["sh", "-c", line], cwd=home, env=env, stdin=subprocess.DEVNULL, text=True,
            capture_output=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        return done.stdout

    return run


@pytest.mark.llama
def test_the_lines_for_a_model_of_ones_own_run_as_written(shell):
    first, *_ = blocks()
    assert first[0].startswith("pip install .  ")
    said = {}
    for line in first[1:]:
        said[shlex.split(line, comments=True)[0]] = shell(quick(line))
    assert "wiki" in said["pt2-eval"] or "KL" in said["pt2-eval"]
    assert "iq1_m" in said["pt2-bench"].lower()


@pytest.mark.llama
def test_the_lines_for_a_base_model_run_as_written(shell):
    _, base = blocks()
    shell(f"cp -r {shlex.quote(str(MODEL))} Llama-3.2-1B")
    said = [shell(quick(line)) for line in base]
    assert "The river" in said[-1]


def test_the_readme_names_every_command_of_the_block():
    lines = [line for block in blocks() for line in block]
    assert {shlex.split(x)[0] for x in lines} == {*MODULES, "hf", "pip"}
