"""What the programs of a build need of a machine: system, C library, instructions of the CPU."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_llama import toolchain
from pt2_llama.builds import Stamp

# Names, as /proc/cpuinfo has them, of what a compiler makes use of by itself or ggml asks for. The
# others (virtualisation, security, counters) do not matter to a program.
_USED = re.compile(
    # x86-64
    r"sse\w*|ssse3|pni|popcnt|abm|avx\w*|f16c|fma|bmi[12]|movbe|gfni|vaes|vpclmulqdq|amx_\w+"
    # aarch64
    r"|asimd\w*|fphp|atomics|lrcpc|i8mm|bf16|sve\w*|sme(?!p$)\w*"
)
# What ggml's CMake turns on by itself when GGML_NATIVE is off, and its names of the rest.
_X86_DEFAULTS = ("sse4_2", "avx", "avx2", "bmi2", "fma", "f16c")
_X86_OPTIONS = {
    "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_TILE": "amx_tile",
    "AMX_INT8": "amx_int8",
    "AMX_BF16": "amx_bf16",
}


@dataclass(frozen=True)
class Needs:
    """What a machine must have to run a build.

    Attributes:
        system, machine: as :mod:`platform` names them: "Linux", "x86_64".
        glibc: the newest version that a program or library asks for, such as "2.34"; "" for none.
        cpu: names of CPU features, as the kernel lists them; empty where it does not.
    """

    system: str
    machine: str
    glibc: str
    cpu: tuple[str, ...]


def needs_of(stamp: Stamp, bin_dir: Path) -> Needs:
    """What a build that was made for this machine needs."""
    return Needs(
        platform.system(),
        platform.machine(),
        newest_glibc(bin_dir),
        cpu_features(stamp, toolchain.cpu_flags()),
    )


def cpu_features(stamp: Stamp, flags: list[str]) -> tuple[str, ...]:
    """The features that a build uses, of those that the CPU it was made on has (``flags``)."""
    options = dict(re.findall(r"^-D(\w+)(?::\w+)?=(\w+)$", "\n".join(stamp.flags), re.MULTILINE))
    if _is_on(options.get("GGML_NATIVE", "ON")):
        amx = stamp.amx == "on"
        return tuple(f for f in flags if _USED.fullmatch(f) and (amx or not f.startswith("amx_")))
    if "avx" not in flags:  # no x86-64, where ggml's plain build is the architecture's own
        return ()
    off = {f"GGML_{f.replace('sse4_2', 'sse42').upper()}": f for f in _X86_DEFAULTS}
    found = [f for name, f in off.items() if _is_on(options.get(name, "ON"))]
    found += [f for name, f in _X86_OPTIONS.items() if _is_on(options.get(f"GGML_{name}", "OFF"))]
    return tuple(sorted(found))


def _is_on(value: str) -> bool:
    return value.upper() in ("ON", "1", "TRUE", "YES")


def newest_glibc(bin_dir: Path) -> str:
    """The newest ``GLIBC_2.x`` that a file in the folder asks for, "" where none does."""
    found = {(0, 0)}
    for path in bin_dir.iterdir():
        if path.is_file() and not path.is_symlink():
            names = re.findall(rb"\0GLIBC_(\d+)\.(\d+)", path.read_bytes())
            found |= {(int(major), int(minor)) for major, minor in names}
    newest = max(found)
    return f"{newest[0]}.{newest[1]}" if newest > (0, 0) else ""


def check(needs: Needs, what: str) -> None:
    """Refuse ``what`` where this machine lacks something it needs.

    Raises:
        PT2Error: the system, the C library or the CPU does not do.
    """
    here = (platform.system(), platform.machine())
    if here != (needs.system, needs.machine):
        raise PT2Error(
            f"{what} is for {needs.system} on {needs.machine}, and this is {here[0]} on {here[1]}; "
            "run here: pt2-llama build"
        )
    name, version = platform.libc_ver()
    if needs.glibc and (name != "glibc" or _numbers(version) < _numbers(needs.glibc)):
        have = f"{name} {version}".strip() or "another C library"
        raise PT2Error(
            f"{what} needs glibc {needs.glibc} or newer, and this machine has {have}; pack a build "
            "of an older system, or run here: pt2-llama build"
        )
    lacking = sorted(set(needs.cpu) - set(toolchain.cpu_flags()))
    if lacking:
        shown = ", ".join(lacking[:6]) + (", ..." if len(lacking) > 6 else "")
        raise PT2Error(
            f"{what} uses instructions that this CPU lacks ({shown}); run here: pt2-llama build, "
            "or pack a build of: pt2-llama build --cmake-arg=-DGGML_NATIVE=OFF"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version))
