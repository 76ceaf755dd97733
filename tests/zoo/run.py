"""Run a function for many classes, in processes side by side, with limits on time and memory.

The parent imports torch and transformers once; each class runs in a fork of it, so that a crash, a
leak or an endless loop costs one row of the table.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 900.0
MEMORY = 6 << 30  # bytes of data that a class may hold
Work = Callable[[Path, str, str], dict[str, Any]]


# What every class imports; transformers loads its parts only when they are asked for.
SHARED = (
    "transformers.modeling_utils", "transformers.masking_utils", "transformers.generation",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "export.pipeline", "quantize.pipeline", "quantize.proof_run", "tests.zoo.whole",
)  # fmt: skip


def prepare() -> None:
    """Import and make what every class needs, and leave one thread to each."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Of llama.cpp's programs: threads that wait for one another take most of a tiny model's time.
    os.environ["LLAMA_ARG_THREADS"] = "1"
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in SHARED:
        importlib.import_module(name)
    from tests.zoo import tokenizers

    tokenizers.train()


def run_all(
    work: Work, classes: Iterable[tuple[str, str]], jobs: int, seconds: float = SECONDS
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run ``work(folder, name, kind)`` for each class; yields results as they come.

    A result is what ``work`` returns, plus ``seconds``; or ``error``, a line, where it raised,
    crashed or ran out of time.
    """
    waiting = list(classes)
    running: dict[int, tuple[str, Path, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, kind = waiting.pop(0)
                folder = Path(tempfile.mkdtemp(prefix=f"pt2-zoo-{name}-"))
                running[_start(work, folder, name, kind)] = (name, folder, time.monotonic())
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                name, folder, began = running.pop(pid)
                yield name, {**_result(folder, status), "seconds": time.monotonic() - began}
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for pid, (_, folder, began) in running.items():
                if time.monotonic() - began > seconds:
                    _note(folder, {"error": f"took more than {seconds:.0f} s"})
                    _end(pid)
            time.sleep(0.05)
    finally:
        for pid, (_, folder, _) in running.items():
            _end(pid)
            shutil.rmtree(folder, ignore_errors=True)


def _start(work: Work, folder: Path, name: str, kind: str) -> int:
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        _note(folder, work(folder, name, kind))
        code = 0
    except BaseException as e:
        traceback.print_exc()
        _note(folder, {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"})
    finally:
        sys.stderr.flush()
        os._exit(code)


def _note(folder: Path, value: dict[str, Any]) -> None:
    file = folder / "result.json"
    if not file.exists():
        file.write_text(json.dumps(value), encoding="utf-8")


def _result(folder: Path, status: int) -> dict[str, Any]:
    file = folder / "result.json"
    if file.exists():
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    elif os.WIFSIGNALED(status):
        value = {"error": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    else:
        value = {"error": "ended without a word"}
    if keep := os.environ.get("PT2_ZOO_KEEP"):
        shutil.copytree(folder, Path(keep) / folder.name.split("-")[2], dirs_exist_ok=True)
    return value


def _end(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
