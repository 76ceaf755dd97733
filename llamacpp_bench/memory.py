"""Measured read bandwidth of the machine's memory: what decode is held against.

A decoded token at batch 1 reads every weight once, so tokens/s times bytes per token cannot exceed
the rate at which memory can be read. The test streams over one buffer per thread with the C
library's `memchr`, looking for a byte that is not there: reads only, vectorised, no arithmetic to
speak of, and ctypes releases Python's lock meanwhile. Every page is written first, because
untouched pages would all be the one zero page and sit in cache. The best of several passes counts:
noise only ever makes memory slower.

On a GPU the same question is put to torch (a sum over a large float32 tensor), when torch sees one,
or to a program that does nothing but read (benchmarks/h200/stream_read.cu is one; torch's sum
reached 91% of its rate on an H200, so shares of the sum's rate come out too high).
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamacpp_bench.process import run_tool
from pt2_core.errors import PT2Error

MIN_BUFFER = 1 << 30
GPU_BUFFER = 4 << 30


@dataclass(frozen=True)
class Bandwidth:
    """`bytes_per_second` read with `method`; `note` says what limits the figure, or why it is 0."""

    bytes_per_second: float
    method: str
    note: str = ""


def measure_cpu(threads: int, buffer_bytes: int | None = None, passes: int = 6) -> Bandwidth:
    """Stream reads over `buffer_bytes` (default: :func:`buffer_size`) with `threads` threads."""
    size = buffer_bytes or buffer_size()
    part = size // threads
    note = ""
    cache = last_level_cache()
    if size < 4 * cache:
        note = f"the buffer is only {size / cache:.1f} times the last-level cache"
    buffers = [np.full(part, 1, np.uint8) for _ in range(threads)]
    scan = ctypes.CDLL(None).memchr
    scan.restype, scan.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            found = list(pool.map(lambda b: scan(b.ctypes.data, 0, part), buffers))
            best = max(best, threads * part / (time.perf_counter() - started))
            assert not any(found), "the buffer holds no zero byte"
    method = f"memchr over {threads} x {part >> 20} MiB, best of {passes}"
    return Bandwidth(best, method, note)


def measure_gpu(passes: int = 10) -> Bandwidth:
    """Stream reads on GPU 0 through torch; 0 with a note where torch sees no GPU."""
    try:
        import torch
    except ImportError:
        return Bandwidth(0.0, "none", "torch is not installed; give --bandwidth GB/s")
    if not torch.cuda.is_available():
        return Bandwidth(0.0, "none", "torch sees no GPU; give --bandwidth GB/s")
    free, _ = torch.cuda.mem_get_info()
    x = torch.ones(min(GPU_BUFFER, free // 2) // 4, dtype=torch.float32, device="cuda")
    best = 0.0
    for _ in range(passes):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        x.sum()
        stop.record()
        torch.cuda.synchronize()
        best = max(best, x.numel() * 4 / (start.elapsed_time(stop) / 1e3))
    method = f"torch sum over {x.numel() * 4 >> 20} MiB, best of {passes}"
    del x
    torch.cuda.empty_cache()
    return Bandwidth(best, method)


def measure_by_program(program: str | os.PathLike[str], log: Path) -> Bandwidth:
    """The rate that a program measures.

    It takes no arguments and its last line on stdout is a JSON object with `bytes_per_second` (a
    positive number) and `method` (what it did).

    Raises:
        PT2Error: the program is not there, fails, or prints something else.
    """
    path = Path(program)
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise PT2Error(f"--bandwidth-program {path}: there is no such program")
    lines = run_tool([path.resolve()], os.environ, log, timeout=60).stdout.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    try:
        found = json.loads(last)
        rate, method = float(found["bytes_per_second"]), str(found["method"])
    except (ValueError, KeyError, TypeError) as e:
        raise PT2Error(
            f"{path.name} ended with {last[:60]!r}, not with a JSON object that has "
            "bytes_per_second and method"
        ) from e
    if not rate > 0:
        raise PT2Error(f"{path.name} gave {rate} bytes per second")
    return Bandwidth(rate, method)


def last_level_cache() -> int:
    """Bytes of the largest CPU cache, 0 where the system does not say."""
    largest = 0
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip())
        if match:
            largest = max(largest, int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return largest


def buffer_size() -> int:
    """Eight times the last-level cache, at least 1 GiB, at most a quarter of the free memory."""
    return min(max(MIN_BUFFER, 8 * last_level_cache()), available_memory() // 4)


def available_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
