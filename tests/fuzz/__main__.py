"""The command: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
import time

from . import __doc__ as about
from .readers import READERS
from .run import OUTCOMES, Tally, run_reader

SHOWN = 5  # findings of one reader


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [r.name for r in READERS]
    parser.add_argument("--cases", type=int, default=6000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=names, action="append", help="only this one")
    parser.add_argument("--case", type=int, help="only this case of the one --reader")
    parser.add_argument(
        "--programs", type=int, metavar="N", help="runs of llama-* programs instead"
    )
    parser.add_argument(
        "--kernels", type=int, metavar="N", help="N shapes through the C code instead"
    )
    args = parser.parse_args()
    if args.programs is not None:
        from .programs import run_programs

        return run_programs(args.programs, args.seed)
    if args.kernels is not None:
        from .kernels import run_kernels

        return run_kernels(args.kernels, args.seed)
    chosen = [r for r in READERS if not args.reader or r.name in args.reader]
    each = -(-args.cases // len(chosen))
    cases = range(each) if args.case is None else range(args.case, args.case + 1)
    return run_readers(chosen, cases, args.seed)


def run_readers(chosen: list, cases: range, seed: int) -> int:
    """Run, print a row per reader and what must not be; 1 where there is any of that."""
    began = time.monotonic()
    tallies = {}
    head = f"{'reader':14}" + "".join(f"{k:>12}" for k in ("cases", *OUTCOMES)) + f"{'slowest':>12}"
    print(head)
    for reader in chosen:
        tallies[reader.name] = run_reader(reader, cases, seed)
        print(_row(reader.name, tallies[reader.name]), flush=True)
    total = Tally()
    for t in tallies.values():
        total.counts += t.counts
        total.slowest = max(total.slowest, t.slowest)
    print(_row("all", total))
    print(f"seed {seed}, {time.monotonic() - began:.1f} s")
    for t in tallies.values():
        print("\n".join(t.findings[:SHOWN]), end="\n" if t.findings else "")
    return int(total.bad > 0)


def _row(name: str, t: Tally) -> str:
    numbers = [sum(t.counts.values()), *(t.counts[k] for k in OUTCOMES)]
    return f"{name:14}" + "".join(f"{n:>12}" for n in numbers) + f"{1000 * t.slowest:>9.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
