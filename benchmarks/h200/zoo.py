"""Hold the zoo's files against a build of llama.cpp, on the machine that has it.

    python -m tests.zoo --keep zoo-files                       # here: needs torch
    python benchmarks/h200/zoo.py zoo-files --build BIN        # there: NumPy and the checkout

BIN is the folder with llama-perplexity and llama-tokenize; without it, the newest build of
``--variant`` that pt2-llama made is taken. Each file is run with all its layers on the GPU and, as
a comparison, with none there. A line per file; the exit code is 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from export.proof import Folder, Programs, Verdict, check_file
from pt2_core.errors import PT2Error
from pt2_llama import api
from tests.zoo.kept import kept


@dataclass(frozen=True)
class OnDevice:
    """A build whose programs are told by the environment how many layers go to the GPU."""

    programs: Programs
    layers: int

    def tool(self, name: str) -> Path:
        """The program's path."""
        return self.programs.tool(name)

    def env(self) -> dict[str, str]:
        """llama.cpp reads the option's value from this variable."""
        found = {**self.programs.env(), "LLAMA_ARG_N_GPU_LAYERS": str(self.layers)}
        # With no layer there, large products would still be sent to a GPU that can be seen.
        return found if self.layers else {**found, "CUDA_VISIBLE_DEVICES": ""}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of python -m tests.zoo --keep")
    parser.add_argument("--build", type=Path, help="folder with llama.cpp's programs")
    parser.add_argument("--variant", default="cuda", help="of pt2-llama's builds (%(default)s)")
    args = parser.parse_args()
    programs = Folder(args.build) if args.build else api.require_build(args.variant)
    wrong, count = 0, 0
    print("| file | GPU: KL | same top | CPU: KL | same top | |\n|---|---|---|---|---|---|")
    for name, file, proof, gaps in kept(args.folder):
        cells, problems = [], []
        for layers in (99, 0):
            try:
                verdict = check_file(file, proof, OnDevice(programs, layers), gaps=gaps)
                cells.append(_figures(verdict))
                problems.append(verdict.problem)
            except PT2Error as e:
                cells.append("- | -")
                problems.append(str(e))
        bad = next((p for p in problems if p), None)
        wrong, count = wrong + (bad is not None), count + 1
        print(f"| {name} | {' | '.join(cells)} | {bad or ''} |", flush=True)
    print(f"\n{count - wrong} of {count} files are right")
    return int(wrong > 0 or count == 0)


def _figures(verdict: Verdict) -> str:
    return f"{verdict.difference.kl:.5f} | {verdict.difference.same_top:.1%}"


if __name__ == "__main__":
    sys.exit(main())
