"""Our llama.cpp's programs on changed GGUF files of our types: exit code 0 or 1, and in time."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from pt2_core import formats
from pt2_llama import api

from . import gguf_file, mutate

LIMIT_SECONDS = 120.0  # of one run; a right file takes a second
MEMORY_BYTES = 8 << 30
KINDS = tuple(formats.TYPES)
# What each program is called with; {out} is a file that may be written.
PROGRAMS = {
    "llama-bench": ["-m", "{model}", "-p", "8", "-n", "1", "-r", "1", "-t", "1"],
    "llama-completion": ["-m", "{model}", "-p", "a b", "-n", "2", "-t", "1", "-no-cnv",
                         "--no-warmup", "--check-tensors"],
    "llama-quantize": ["--allow-requantize", "{model}", "{out}", "Q8_0", "1"],
}  # fmt: skip


def run_program(name: str, model: Path) -> tuple[int | None, str]:
    """Run one program on a file: its exit code (None: too slow) and the end of what it said."""
    build, out = api.require_build(), model.with_suffix(".out.gguf")
    words = [w.format(model=model, out=out) for w in PROGRAMS[name]]
    try:
        done = subprocess.run(
            [build.tool(name), *words], env=build.env(), stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=LIMIT_SECONDS, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES,) * 2),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"more than {LIMIT_SECONDS:.0f} s"
    finally:
        out.unlink(missing_ok=True)
    return done.returncode, (done.stdout + done.stderr)[-1500:]


def changed_file(kind: str, case: int, seed: int) -> bytes:
    """The file of a case."""
    rng = random.Random(f"{seed}/programs/{case}")
    return mutate.mutate_gguf(gguf_file.tiny_file(kind), rng)


def run_programs(runs: int, seed: int) -> int:
    """The command: so many runs, the programs in turn; 1 where one ended by a signal or not."""
    folder = Path(tempfile.mkdtemp(prefix="pt2-fuzz-"))
    counts: dict[str, Counter[str]] = {name: Counter() for name in PROGRAMS}
    findings = []
    try:
        for number in range(runs):
            name, case = list(PROGRAMS)[number % 3], number // 3
            model = folder / "m.gguf"
            model.write_bytes(changed_file(KINDS[case % len(KINDS)], case, seed))
            code, words = run_program(name, model)
            outcome = {0: "ran", 1: "refused", None: "hangs"}.get(code, "crashed")
            counts[name][outcome] += 1
            if outcome in ("hangs", "crashed"):
                findings.append(
                    f"{name} on case {case} of {KINDS[case % len(KINDS)]}: {code}: {words}"
                )
    finally:
        shutil.rmtree(folder)
    for name, c in counts.items():
        figures = ", ".join(f"{c[k]} {k}" for k in ("ran", "refused", "crashed", "hangs"))
        print(f"{name:18} {sum(c.values())} runs: {figures}")
    print("\n".join(findings[:5]), end="\n" if findings else "")
    return int(bool(findings))
