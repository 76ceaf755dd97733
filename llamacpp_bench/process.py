"""Run one program: stdout returned, stderr kept in a log, peak memory watched, crashes named."""

from __future__ import annotations

import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.process import children

POLL_SECONDS = 0.02
_ERROR_WORDS = ("error", "failed", "invalid", "unable", "abort", "assert", "cannot")


@dataclass(frozen=True)
class Finished:
    """A program that ended well.

    `peak_rss` is in bytes (0 where the system does not tell), `seconds` is wall-clock time, `log`
    is the file with everything it wrote to stderr.
    """

    stdout: str
    seconds: float
    peak_rss: int
    log: Path


def run_tool(
    argv: Sequence[str | Path],
    env: Mapping[str, str],
    log: Path,
    on_output: Callable[[str], None] | None = None,
    timeout: float | None = None,
) -> Finished:
    """Run `argv` to its end.

    Args:
        env: the environment of the child.
        log: where stderr goes; kept whatever happens, replaced if it exists.
        on_output: called with stdout as it comes, in pieces (for progress).
        timeout: seconds after which the program is killed (None: never).

    Raises:
        PT2Error: the program cannot be started, exits with an error, is killed by a signal or runs
            past the timeout. The message has the reason from its log and names the log.
    """
    words = [str(a) for a in argv]
    name = Path(words[0]).name
    started = time.perf_counter()
    with log.open("wb") as err:
        err.write(f"$ {shlex.join(words)}\n".encode())
        err.flush()
        late = threading.Event()
        with ExitStack() as stack:
            try:
                running = children.child(words, env=env, stdout=children.PIPE, stderr=err)
                child = stack.enter_context(running)
            except OSError as e:
                raise PT2Error(f"cannot start {name}: {e.strerror}; run: pt2-llama doctor") from e
            watch = _PeakWatch(child.pid)
            stack.callback(watch.stop)

            def stop() -> None:
                late.set()
                children.kill(child)

            alarm = threading.Timer(timeout or 0, stop)
            stack.callback(alarm.cancel)
            if timeout is not None:
                alarm.start()
            stdout = _drain(child, on_output)
            code = child.wait()
            peak = watch.stop()
    if late.is_set():
        raise PT2Error(f"{name} was stopped after {timeout:g} s (log: {log})")
    if code != 0:
        raise PT2Error(_failure(name, code, log, stdout))
    return Finished(stdout, time.perf_counter() - started, peak, log)


def _drain(child: subprocess.Popen[bytes], on_output: Callable[[str], None] | None) -> str:
    assert child.stdout is not None
    pieces: list[str] = []
    with child.stdout as pipe:
        while piece := pipe.read1(65536):  # type: ignore[attr-defined]
            text = piece.decode("utf-8", "replace")
            pieces.append(text)
            if on_output is not None:
                on_output(text)
    return "".join(pieces)


class _PeakWatch:
    """Polls the child's VmHWM.

    Not `ru_maxrss` of wait4: that one starts from the parent's size at the fork, so a small child
    of a large Python process would seem as large as the parent. VmHWM belongs to the new program
    and never falls, so only growth within the last poll can be missed.
    """

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._peak = max(self._peak, read_vm_hwm(self._status))

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self._peak


def read_vm_hwm(status: Path) -> int:
    """Peak resident bytes from a `/proc/PID/status` file; 0 when the process is gone."""
    try:
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _failure(name: str, code: int, log: Path, stdout: str) -> str:
    if code < 0:
        try:
            label = signal.Signals(-code).name
        except ValueError:
            label = f"signal {-code}"
        hint = {
            "SIGILL": "; the build uses instructions this CPU lacks, run: pt2-llama doctor",
            "SIGSEGV": "; if the CPU's AMX faults, try --no-repack or run: pt2-llama doctor",
            "SIGKILL": "; out of memory?",
        }.get(label, "")
        return f"{name} was killed by {label}{hint} (log: {log})"
    return f"{name} failed (exit {code}): {_reason(log, stdout)} (log: {log})"


def _reason(log: Path, stdout: str) -> str:
    """The first line of the log that looks like the cause, else the last line there is."""
    lines = log.read_text("utf-8", "replace").splitlines()[1:] + stdout.splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    for line in lines:
        if any(word in line.lower() for word in _ERROR_WORDS):
            return line[:300]
    return lines[-1][:300] if lines else "it said nothing"
