"""Which code path a built CPU backend takes for our types on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.process import children

# Asked in a process of its own: the library aborts when GGML_TQ_CPU names a path it does not have,
# and libraries of two builds do not share a process. It prints nothing where the library has no
# types of ours.
_ASK = """\
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
if not hasattr(lib, "ggml_tq_active_name"):
    sys.exit(0)
lib.ggml_tq_active_name.restype = ctypes.c_char_p
lib.ggml_tq_path_names.restype = ctypes.POINTER(ctypes.c_char_p)
lib.ggml_tq_test_supported.restype = ctypes.c_bool
names = []
for name in lib.ggml_tq_path_names():
    if name is None:
        break
    if lib.ggml_tq_test_supported(ctypes.c_char_p(name)):
        names.append(name.decode())
print(lib.ggml_tq_active_name().decode(), *names)
"""


@dataclass(frozen=True)
class KernelPath:
    """The path taken (GGML_TQ_CPU forces one), and all that this machine can run, best first."""

    active: str
    supported: tuple[str, ...]


def kernel_path(folder: Path, env: Mapping[str, str]) -> KernelPath | None:
    """Ask the CPU backend in a build's folder of libraries.

    Args:
        env: the environment in which the build's programs run.

    Returns:
        None where there is no CPU backend as a library of its own, or one without our types.

    Raises:
        PT2Error: the library cannot be asked; its own words are in the message.
    """
    library = next(iter(sorted(folder.glob("libggml-cpu*"))), None)
    if library is None:
        return None
    try:
        done = children.run([sys.executable, "-c", _ASK, str(library)], timeout=60, env=env)
    except children.CannotRun as e:
        raise PT2Error(f"{library.name} does not tell its kernels: {e}") from e
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "GGML_TQ_CPU" in line]
        last = (lines or done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise PT2Error(f"{library.name} does not tell its kernels: {last}")
    words = done.stdout.split()
    return KernelPath(words[0], tuple(words[1:])) if words else None
