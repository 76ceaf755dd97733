"""llama.cpp's converter, imported once and forked for each model.

The exporter starts :mod:`export.converter_driver` as a process of its own, most of whose time goes
into importing torch and transformers. :func:`serve` does that once; :func:`installed` lets
:mod:`export.converter` ask it. What runs in a fork is the driver's own ``main``, with the same job,
output and exit code.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 600  # a conversion that takes longer is ended


@contextmanager
def serving(folder: Path, source: Path) -> Iterator[Path]:
    """Start the server; gives the socket's path.

    Args:
        folder: for the socket.
        source: llama.cpp's source tree.
    """
    from pt2_core.process.isolated import child_env, isolated, search_path

    where = folder / "converter.socket"
    job = {"path": search_path(), "source": str(source), "socket": str(where)}
    command = isolated(Path(__file__).resolve(), [json.dumps(job)])
    with subprocess.Popen(command, env=child_env(), stdin=subprocess.PIPE) as process:
        try:
            while not where.exists():
                if process.poll() is not None:
                    raise RuntimeError("the converter's server did not start")
                time.sleep(0.05)
            yield where
        finally:
            process.kill()


def install(where: Path) -> None:
    """Let :mod:`export.converter` of this process ask the server at a socket."""
    from export import converter, converter_driver

    driver = str(Path(converter_driver.__file__).resolve())
    theirs = converter.children

    class Children:
        """Runs the driver in the server, and everything else as before."""

        def __getattr__(self, name: str) -> Any:
            return getattr(theirs, name)

        def run(self, argv: Sequence[Any], **more: Any) -> subprocess.CompletedProcess[str]:
            if driver not in map(str, argv):
                return theirs.run(argv, **more)
            return answers.get(Path(argv[-1]))

    answers = Answers(where)
    converter.children = Children()  # type: ignore[assignment]


class Answers:
    """Asks the server, and gives what it made once more where the same is asked for again.

    The exports of one artifact as three types ask the converter for the same carrier.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self.kept = Path(tempfile.mkdtemp(prefix="pt2-zoo-carriers-", dir=where.parent))
        self.known: dict[str, Path] = {}

    def get(self, job: Path) -> subprocess.CompletedProcess[str]:
        """What the driver makes of a job file, beside it."""
        before = _files(job.parent)
        key = _content(job)
        if key in self.known:
            for file in self.known[key].iterdir():
                shutil.copy(file, job.parent / file.name)
            return subprocess.CompletedProcess([str(job)], 0, "", "")
        done = _ask(self.where, job)
        if done.returncode == 0:
            self.known[key] = self.kept / str(len(self.known))
            self.known[key].mkdir()
            # An earlier answer's files lie there too, and are written once more.
            for file, written in _files(job.parent).items():
                if before.get(file) != written:
                    shutil.copy(file, self.known[key] / file.name)
        return done


def _files(folder: Path) -> dict[Path, int]:
    """The files of a folder, and when each was written, in ns."""
    return {f: f.stat().st_mtime_ns for f in folder.iterdir() if f.is_file()}


def _content(job: Path) -> str:
    """What a job asks for, wherever its folder is."""
    place = str(job.parent)
    text = json.loads(job.read_text(encoding="utf-8").replace(place, "."))
    arrays = [hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(job.parent.glob("*.npz"))]
    return json.dumps([text, arrays], sort_keys=True)


def _ask(where: Path, job: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(where))
        client.sendall(f"{job}\n".encode())
        answer = client.makefile().readline()
    log = job.with_suffix(".log")
    code = int(answer) if answer.strip() else -signal.SIGKILL
    return subprocess.CompletedProcess([str(job)], code, "", log.read_text(errors="replace"))


def serve(job: dict[str, Any]) -> None:
    """Import everything, then fork for each job file that comes in."""
    root = str(Path(__file__).resolve().parents[2])
    sys.path.insert(0, root)
    driver = importlib.import_module("export.converter_driver")
    driver.search_first(job)
    torch = importlib.import_module("torch")
    for name in ("transformers", "numpy", "gguf", "conversion", "export.converter_vocab",
                 "export.converter_metadata", "sentencepiece"):  # fmt: skip
        importlib.import_module(name)
    importlib.import_module("conversion").load_all_models()
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(job["socket"])
        server.listen(16)
        # Our standard input is the parent's pipe: it ends when the parent does.
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _one(driver, client)
            client.close()


def _one(driver: Any, client: socket.socket) -> None:
    """In a fork: run one job, answer with its exit code, and end."""
    code = 1
    try:
        signal.alarm(SECONDS)
        job = Path(client.makefile().readline().strip())
        log = os.open(job.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = driver.main([str(job)])
        sys.stdout.flush()
        sys.stderr.flush()
        client.sendall(f"{code}\n".encode())
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
