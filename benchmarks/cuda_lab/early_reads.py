"""Which kernels read global memory before they wait for the kernels before them?

    python benchmarks/cuda_lab/early_reads.py libggml-cuda.so          # or object files; sm_90 code

With programmatic dependent launch a kernel may run while the one before it still writes, up to its
``griddepcontrol.wait`` (ACQBULK in machine code). The compiler does not know that and moves loads
past it: what stands behind the wait in the source may be read before it. This lists, from the
disassembly, every kernel with reads before its first wait, and whether that is

- weights: a product of ours, which fetches weights early and nothing else;
- upstream: a kernel of upstream; it must not follow a kernel that starts its successor early
  (``ggml_cuda_kernel_launch`` sees to it, tq-early.cuh);
- WRONG: any other kernel of ours. Then the exit status is 1.

Needs cuobjdump and c++filt (CUDA toolkit, binutils).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

READ = re.compile(r"\b(LDG|LD\.E|UBLKCP|LDGSTS|ATOMG|UTMALDG)\b|\b(LDG|UBLKCP|LDGSTS)\.")
WEIGHTS = ("tq_decode_stream", "tq_decode_registers", "prefill_mma", "prefill_wgmma")
OURS = ("tq_", "tq-", "norm_kernel", "quantize_kernel", "attention_kernel", "rope_and_cache")


def early_reads(sass: str) -> Iterator[tuple[str, int, str]]:
    """Kernels with global reads before their first wait: mangled name, number, first of them."""
    name, reads, waited = "", list[str](), False
    for line in sass.splitlines():
        if found := re.search(r"Function : (\S+)", line):
            name, reads, waited = found.group(1), [], False
        elif (found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)) and not waited:
            if "ACQBULK" in found.group(1):
                waited = True
                if reads:
                    yield name, len(reads), reads[0]
            elif READ.search(found.group(1)):
                reads.append(found.group(1).strip())


def kind(name: str) -> str:
    """What an early read in this kernel (demangled name) means."""
    if any(w in name for w in WEIGHTS):
        return "weights"
    return "WRONG" if any(o in name for o in OURS) else "upstream"


def main(files: list[str]) -> int:
    if not files or files[0] in ("-h", "--help"):
        print(__doc__)
        return 2
    for tool in ("cuobjdump", "c++filt"):
        if not shutil.which(tool):
            print(f"early_reads: no {tool} on the PATH", file=sys.stderr)
            return 2
    wrong = False
    for file in files:
        sass = subprocess.run(["cuobjdump", "-sass", file], capture_output=True, text=True)
        if sass.returncode or "ACQBULK" not in sass.stdout:
            print(f"{file}: no sm_90 code with a wait in it {sass.stderr.strip()}")
            continue
        for mangled, number, first in early_reads(sass.stdout):
            name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout
            name = name.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
            meaning = kind(name)
            wrong |= meaning == "WRONG"
            print(f"{meaning:8} {name.split('(')[0]}: {number}, first {first}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
