"""Start other programs so that they end with us, however we end.

Every child of the project starts here. It is the leader of a process group of its own, which is
ended as a whole when the ``with`` block is left early. For the case that we are killed without a
chance to do so (kill -9, out of memory), Linux is asked to end it with us (PR_SET_PDEATHSIG).

A tiny Python program (``_LAUNCHER``) asks for that and then becomes the child: doing it between
fork and exec in this process could deadlock, for torch and others have threads. With ``tree`` it
stays and waits, and ends the child's own children too: what a build and pip need, whose compilers
would otherwise outlive them.

Linux ends such a child when the *thread* that started it ends: start long-lived ones in the main
thread.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pt2_core.process.stop import held

GRACE_SECONDS = 5.0
DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
TimeoutExpired = subprocess.TimeoutExpired
CannotRun = (OSError, TimeoutExpired)

# Arguments: our process id, "tree" or "one", the program's path, its argv.
_LAUNCHER = """
import os, signal, sys, time
parent, tree, path, argv = int(sys.argv[1]), sys.argv[2] == "tree", sys.argv[3], sys.argv[4:]
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM if tree else signal.SIGKILL), 0, 0, 0)
except (ImportError, OSError, AttributeError):
    pass
if os.getppid() != parent:
    os._exit(125)
ours = [signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
child = 0
def end(number, frame):
    for s in ours[2:]:
        signal.signal(s, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    for _ in range(30):
        try:
            if child and os.waitpid(child, os.WNOHANG)[0]:
                break
        except ChildProcessError:
            break
        time.sleep(0.1)
    os.killpg(0, signal.SIGKILL)
try:
    if not tree:
        for s in ours:
            signal.signal(s, signal.SIG_DFL)
        os.execv(path, argv)
    for s in ours[2:]:
        signal.signal(s, end)
    signal.pthread_sigmask(signal.SIG_BLOCK, ours[2:])
    child = os.posix_spawn(path, argv, os.environ, setsigdef=ours, setsigmask=[])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ours[2:])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
except OSError as e:
    os.write(2, f"cannot start {path}: {e.strerror}\\n".encode("utf-8", "replace"))
    os._exit(127)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextmanager
def child(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    tree: bool = False,
    **popen: Any,
) -> Iterator[subprocess.Popen[Any]]:
    """Start a program; when the block is left and it still runs, it is ended with its group.

    Args:
        env: its environment (None: ours).
        tree: also end what it starts, should we be killed. ``pid`` is then not its own but that of
            the process which watches over it.
        popen: as :class:`subprocess.Popen` takes them; stdin is closed unless given.

    Raises:
        OSError: there is no such program, or it cannot be started.
    """
    words = [os.fspath(a) for a in argv]
    path = _program(words[0], env)
    command = words
    executable: str | None = path
    if sys.platform.startswith("linux") and sys.executable:
        how = "tree" if tree else "one"
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), how, path]
        command, executable = [*launcher, *words], None
    popen.setdefault("stdin", DEVNULL)
    process: subprocess.Popen[Any] | None = None
    try:
        with held():
            process = subprocess.Popen(
                command, executable=executable, env=None if env is None else dict(env),
                start_new_session=True, **popen,
            )  # fmt: skip
        yield process
    finally:
        if process is not None:
            _end(process)
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    tree: bool = False,
    merge: bool = False,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end and return what it wrote, as text.

    Args:
        timeout: seconds after which it is ended.
        merge: put stderr into stdout, in the order of writing.
        cwd: its working folder (None: ours).

    Raises:
        OSError: as :func:`child`.
        subprocess.TimeoutExpired: it took too long.
    """
    options: dict[str, Any] = {
        "stdout": PIPE, "stderr": STDOUT if merge else PIPE, "text": True, "encoding": "utf-8",
        "errors": "replace", "cwd": cwd,
    }  # fmt: skip
    with child(argv, env=env, tree=tree, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as e:  # it has the launcher's words
            raise subprocess.TimeoutExpired(list(argv), e.timeout) from None
        return subprocess.CompletedProcess(list(argv), process.returncode, out, err or "")


def kill(process: subprocess.Popen[Any]) -> None:
    """End a child and its group at once."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _program(name: str, env: Mapping[str, str] | None) -> str:
    """The path of a program, so that a missing one is an error here and not in the launcher."""
    found = shutil.which(name, path=(os.environ if env is None else env).get("PATH"))
    if found is None:
        code = errno.EACCES if os.path.exists(name) else errno.ENOENT
        raise OSError(code, os.strerror(code), name)
    return found


def _end(process: subprocess.Popen[Any]) -> None:
    """End a child and its group: asked first, then made to."""
    if process.poll() is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
            break
