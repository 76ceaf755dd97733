"""Files changed at random, a fixed number of them; python -m tests.fuzz runs more."""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz import kernels
from fuzz import run as fuzz_run
from fuzz.__main__ import run_readers
from fuzz.programs import run_programs
from fuzz.readers import READERS, Reader

from pt2_core.errors import PT2Error
from pt2_core.formats import DEFAULT

ROOT = Path(__file__).parent.parent


def test_every_reader_gives_a_value_or_one_line_for_6000_changed_files():
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "6000", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = {line.split()[0]: line.split()[1:7] for line in done.stdout.splitlines()[1:-1]}
    assert set(rows) == {"all", *(r.name for r in READERS)}
    for name, row in rows.items():
        cases, accepted, refused, wrong, tracebacks, hangs = map(int, row)
        assert cases == accepted + refused and not wrong + tracebacks + hangs
        assert accepted and (refused or name == "stamp"), f"{name}: changes without any effect"
    assert int(rows["all"][0]) >= 6000


def _reader(read, judge=lambda folder, value: None, **more) -> Reader:
    def make(folder: Path) -> None:
        (folder / "x.txt").write_text("right")

    def careful(folder: Path):
        return "right" if (folder / "x.txt").read_bytes() == b"right" else read(folder)

    return Reader("stand-in", make, ("x.txt",), careful, judge, **more)


def _fail(folder: Path) -> None:
    raise KeyError("rows")


def _two_lines(folder: Path) -> None:
    error = PT2Error("one")
    error.args = ("one\ntwo",)
    raise error


def _hungry(folder: Path) -> int:
    return len(bytearray(2 * fuzz_run.MEMORY_BYTES))


def _busy(folder: Path) -> None:
    while True:
        pass


STAND_INS = {
    "tracebacks": [_reader(_fail), _reader(_two_lines), _reader(_hungry)],
    "hangs": [_reader(lambda folder: time.sleep(60)), _reader(_busy)],
    "wrong": [
        _reader(lambda folder: "odd", lambda folder, v: None if v == "right" else "it is odd"),
        _reader(lambda folder: "other", sealed=("x.txt",)),
        _reader(lambda folder: "odd", lambda folder, v: None if v == "right" else v.no_such_thing),
    ],
}


@pytest.mark.parametrize("outcome", STAND_INS)
def test_what_must_not_be_is_counted_and_fails(outcome: str, monkeypatch, capsys):
    monkeypatch.setattr(fuzz_run, "LIMIT_SECONDS", 0.2)
    monkeypatch.setattr(fuzz_run, "WAIT_FACTOR", 2)
    for reader in STAND_INS[outcome]:
        tally = fuzz_run.run_reader(reader, range(4), 0)
        assert tally.counts[outcome] >= 3 and tally.findings
        assert run_readers([reader], range(4), 0) == 1
        assert "stand-in case" in capsys.readouterr().out


def test_a_case_can_be_run_again():
    reader = next(r for r in READERS if r.name == "safetensors")
    some = fuzz_run.run_reader(reader, range(40), 5).counts
    alone = [fuzz_run.run_reader(reader, range(i, i + 1), 5).counts for i in range(40)]
    assert {k: sum(c[k] for c in alone) for k in some} == dict(some)


@pytest.mark.llama
def test_programs_refuse_or_run_changed_files(capsys):
    assert run_programs(9, seed=0) == 0, capsys.readouterr().out


@pytest.mark.llama
def test_the_c_code_is_clean_under_the_sanitizers(tmp_path: Path):
    if not kernels.has_sanitizers("cc", tmp_path):
        pytest.skip("cc has no AddressSanitizer and UBSan here")
    program = kernels.build_kernels(tmp_path)
    kernels.check_controls(program)
    done = kernels.check_kernels(program, 150, seed=0).split()
    assert done[0] == "ok" and int(done[3]) > 5000  # calls
    done = kernels.check_gguf(kernels.build_gguf(tmp_path), 150, seed=0).split()
    assert done[0] == "ok" and int(done[1]) > 5 and int(done[3]) > 5


# A check taken out of a reader: (reader, cases, module, name, what stands in its place).
ROBBED = [
    ("safetensors", 600, "pt2_core.safetensors_file", "_check_layout", lambda *a: None),
    ("safetensors", 600, "pt2_core.safetensors_file", "_size", int),
    ("manifest", 300, "pt2_core.artifact.folder", "check_manifest", lambda *a: None),
    ("artifact", 300, "pt2_core.artifact.matrix", "_value_problem", lambda m: None),
    ("artifact", 300, "pt2_core.artifact.folder", "sha256_file", lambda path: ANY),
    ("sensitivity", 300, "pt2_core.artifact.sensitivity", "_check_energies", lambda *a: None),
    ("sensitivity", 300, "pt2_core.artifact.sensitivity", "sha256_content", lambda *a: ANY),
    ("refine-state", 300, "quantize.refinement.state", "_digest", lambda *a: ANY),
    ("refine-state", 300, "quantize.refinement.state", "validate", lambda *a: None),
    (
        f"gguf-{DEFAULT.ggml_name}",
        600,
        "pt2_core.gguf_info",
        "_check_extent",
        lambda *a: None,
    ),
    (
        f"gguf-{DEFAULT.ggml_name}",
        600,
        "pt2_core.gguf_info",
        "_check_kinds",
        lambda *a: None,
    ),
    ("results", 600, "llamacpp_bench.results", "validate", lambda *a: None),
    ("results", 600, "llamacpp_bench.results", "_disagreement", lambda results: None),
    ("recipe", 600, "quantize.config", "_typed", lambda name, value, kind: value),
    ("published", 600, "llamacpp_bench.show.published", "_PUBLISHED", lambda *a: None),
]


class _Any(str):
    """Equal to every other text: what a checksum is that nobody looks at."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


ANY = _Any("0" * 64)


@pytest.mark.parametrize("robbed", ROBBED, ids=lambda r: f"{r[0]}-{r[3]}")
def test_a_reader_that_lacks_a_check_is_found(robbed, monkeypatch):
    name, cases, module, attribute, instead = robbed
    monkeypatch.setattr(importlib.import_module(module), attribute, instead)
    reader = next(r for r in READERS if r.name == name)
    parts = (range(i, i + 30) for i in range(0, cases, 30))
    assert any(fuzz_run.run_reader(reader, part, 1).bad for part in parts)
