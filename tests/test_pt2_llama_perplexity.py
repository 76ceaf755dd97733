"""llama-perplexity's lost line, and the question which kernels a build takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pt2_core.errors import PT2Error
from pt2_llama import api
from pt2_llama.builds import Build, Stamp
from pt2_llama.kernel_path import kernel_path
from pt2_llama.perplexity import TRIES, final_perplexity, is_whole

# Loses its last line as often as LOST says, and counts its calls.
PROGRAM = """#!/bin/sh
echo run >> "$CALLS"
[ "$MODE" = fail ] && { echo "error: no such model" >&2; exit 1; }
echo "[1]5.0,"
[ "$(wc -l < "$CALLS")" -le "$LOST" ] && exit 0
case "$*" in
  *--kl-divergence*) echo "Mean    KLD:   0.0012 +/- 0.0001" ;;
  *) echo "Final estimate: PPL = 12.5000 +/- 0.2" >&2 ;;
esac
"""


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """A build with a stand-in for llama-perplexity."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "llama-perplexity"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    stamp = Stamp("cpu", "key", "source", None, "cpu", "off", (program.name,), (), "gcc", {})
    return Build(tmp_path, stamp)


def variables(folder: Path, lost: int, mode: str = "") -> dict[str, str]:
    return {"CALLS": str(folder / "calls"), "LOST": str(lost), "MODE": mode}


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().splitlines())


@pytest.mark.parametrize("lost", [0, 2, TRIES - 1])
def test_a_lost_line_is_asked_for_again(build: Build, tmp_path: Path, lost: int) -> None:
    told = build.perplexity(Path("m.gguf"), "-c", "64", env=variables(tmp_path, lost))
    assert told.perplexity() == 12.5 and calls(tmp_path) == lost + 1
    assert "[1]5.0" in told.output


def test_a_comparison_tells_no_perplexity(build: Build, tmp_path: Path) -> None:
    told = build.perplexity(Path("m.gguf"), "--kl-divergence", env=variables(tmp_path, 1))
    assert "Mean    KLD" in told.output and calls(tmp_path) == 2
    with pytest.raises(PT2Error, match="printed no perplexity"):
        told.perplexity()


def test_who_never_tells_and_who_fails_are_errors_of_one_line(build: Build, tmp_path: Path) -> None:
    with pytest.raises(PT2Error, match=f"^llama-perplexity lost its last lines {TRIES} times$"):
        build.perplexity(Path("m.gguf"), env=variables(tmp_path, 99))
    assert calls(tmp_path) == TRIES
    with pytest.raises(PT2Error, match=r"^llama-perplexity failed \(exit 1\): error: no such mod"):
        build.perplexity(Path("m.gguf"), env=variables(tmp_path, 0, "fail"))
    assert calls(tmp_path) == TRIES + 1, "a failure is not tried again"


@pytest.mark.parametrize(
    ("line", "value"),
    [("PPL = 12.3456 +/- 1", 12.3456), ("PPL = nan +/- nan", float("nan")), ("PPL 3", None)],
)
def test_the_final_estimate_is_read(line: str, value: float | None) -> None:
    found = final_perplexity(f"Final estimate: {line}")
    assert found == value or (found != found and value != value)
    assert is_whole(f"Final estimate: {line}") == (value is not None)


def test_a_folder_without_a_cpu_backend_has_no_kernels_of_ours(tmp_path: Path) -> None:
    assert kernel_path(tmp_path, os.environ) is None


def test_a_library_that_cannot_be_asked_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "libggml-cpu.so").write_text("no library")
    with pytest.raises(PT2Error, match=r"libggml-cpu\.so does not tell its kernels: .*"):
        kernel_path(tmp_path, os.environ)


@pytest.mark.llama
def test_a_build_says_which_kernels_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    build = api.require_build("cpu")
    path = build.kernel_path()
    assert path is not None and path.active in path.supported and "generic" in path.supported
    monkeypatch.setenv("GGML_TQ_CPU", "generic")
    forced = build.kernel_path()
    assert forced is not None and forced.active == "generic"
    monkeypatch.setenv("GGML_TQ_CPU", "none")
    with pytest.raises(PT2Error, match="GGML_TQ_CPU=none"):
        build.kernel_path()
