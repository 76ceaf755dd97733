"""Run the readers on changed files and count what happens."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error

from . import mutate
from .readers import Reader

LIMIT_SECONDS = 5.0  # of the processor for one case; the slowest takes a tenth
WAIT_FACTOR = 12  # by the clock, since a machine may be busy with other things
MEMORY_BYTES = 1 << 30  # that a reader may take beyond what the process has
BY_ENDING = {".json": mutate.mutate_json, ".safetensors": mutate.mutate_safetensors,
             ".yaml": mutate.mutate_yaml, ".txt": mutate.mutate_text}  # fmt: skip
OUTCOMES = ("accepted", "refused", "wrong", "tracebacks", "hangs")


class Hang(BaseException):
    """A case takes too long. No Exception, so that no reader can catch it."""


@dataclass
class Tally:
    """What happened to one reader, and the first cases that must not be."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    findings: list[str] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return sum(self.counts[k] for k in OUTCOMES[2:])


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` in the main thread after so many seconds of work, or a longer wait."""

    def stop(number: int, frame: Any) -> None:
        raise Hang

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds),
              (signal.ITIMER_REAL, signal.SIGALRM, WAIT_FACTOR * seconds))  # fmt: skip
    before = {number: signal.signal(number, stop) for _, number, _ in timers}
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for timer, number, _ in timers:
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let the process allocate at most ``more`` bytes beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Bench:
    """One reader and its right files, in a folder that is put right after every case."""

    def __init__(self, reader: Reader, folder: Path, seed: int) -> None:
        self.reader, self.folder, self.seed = reader, folder, seed
        folder.mkdir()
        reader.make(folder)
        self.right = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
        value = reader.read(folder)  # imports, and proof that the seed is right
        if problem := reader.judge(folder, value):
            raise AssertionError(f"the seed of {reader.name} is wrong: {problem}")
        self.seen = reader.seen(value) if reader.sealed else None

    def case(self, number: int) -> tuple[str, str]:
        """Run one case: (outcome, words about it)."""
        rng = random.Random(f"{self.seed}/{self.reader.name}/{number}")
        name = rng.choice(self.reader.files)
        change = self.reader.mutate or BY_ENDING[Path(name).suffix]
        data = change(self.right[name], rng)
        (self.folder / name).write_bytes(data)
        signed = False
        if self.reader.sign is not None and rng.random() < 0.6:
            signed = self.reader.sign(self.folder, name)
        try:
            return self._outcome(name, data, signed)
        finally:
            for file, content in self.right.items():
                if file in (name, "manifest.json"):
                    (self.folder / file).write_bytes(content)

    def _outcome(self, name: str, data: bytes, signed: bool) -> tuple[str, str]:
        try:
            with time_limit(LIMIT_SECONDS):
                value = self.reader.read(self.folder)
        except PT2Error as e:
            lines = str(e).splitlines()
            return ("refused", str(e)) if len(lines) == 1 else ("tracebacks", f"{lines} lines")
        except Hang:
            return "hangs", f"{name}: more than {LIMIT_SECONDS} s of work, or a wait"
        except BaseException as e:
            frames = "".join(traceback.format_tb(e.__traceback__)[-3:])
            return "tracebacks", f"{name}: {type(e).__name__}: {str(e)[:200]}\n{frames}"
        try:
            problem = self.reader.judge(self.folder, value)
            changed = name in self.reader.sealed and not signed and data != self.right[name]
            if changed and self.reader.seen(value) != self.seen:
                problem = problem or "the change was not noticed"
        except Exception as e:  # what cannot even be judged is wrong
            problem = f"{type(e).__name__}: {e}"
        return ("wrong", f"{name}: {problem}") if problem else ("accepted", "")


def run_reader(reader: Reader, cases: range, seed: int) -> Tally:
    """Run a range of cases of one reader."""
    tally = Tally()
    root = Path(tempfile.mkdtemp(prefix="pt2-fuzz-"))
    try:
        bench = Bench(reader, root / reader.name, seed)
        with memory_limit(MEMORY_BYTES):
            for number in cases:
                began = time.process_time()
                outcome, words = bench.case(number)
                tally.slowest = max(tally.slowest, time.process_time() - began)
                tally.counts[outcome] += 1
                if outcome in OUTCOMES[2:]:
                    tally.findings.append(f"{reader.name} case {number}: {outcome}: {words}")
    finally:
        shutil.rmtree(root)
    return tally
