"""Run classes through the whole path, print a row for each, write the table: see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.zoo import table
from tests.zoo.expected import QUICK, REASONS

README = Path(__file__).resolve().parents[2] / "README.md"


def main() -> int:
    """The command; 1 where an outcome is not the expected one."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="classes (all)")
    parser.add_argument("--quick", action="store_true", help="the dozen of make quick")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="no ternary weights: only transformers against llama.cpp in F32",
    )
    parser.add_argument("--list", action="store_true", help="print the classes and end")
    parser.add_argument("--write", action="store_true", help="put the table into README.md")
    parser.add_argument("--json", type=Path, help="write all figures to a file")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep a file of each class there, for benchmarks/h200/zoo.py",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="side by side")
    args = parser.parse_args()
    from pt2_llama import api
    from tests.zoo.classes import causal_classes

    source = api.source_dir()
    classes = causal_classes(source)
    if args.list:
        for name in classes:
            print(f"{name:36} {REASONS.get(name, 'green')}")
        return 0
    names = args.names or (QUICK if args.quick else list(classes))
    if unknown := [n for n in names if n not in classes]:
        parser.error(f"no class {unknown[0]!r}: see --list")
    results: dict[str, dict[str, Any]] = {}
    if not args.plain:
        print(table.header(), flush=True)
    for name, result in run({n: classes[n] for n in names}, source, args):
        results[name] = result
        row = json.dumps({name: result}) if args.plain else table.row(name, result)
        print(row, flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps(results, indent=1, sort_keys=True), encoding="utf-8")
    if args.plain:
        return int(any(map(lambda r: "error" in r, results.values())))
    green = sum(map(table.is_green, results.values()))
    print(f"\n{green} of {len(results)} green")
    if args.write:
        table.put(README, results)
    found = table.problems(results)
    print("\n".join(found), file=sys.stderr)
    return int(bool(found))


def run(
    classes: dict[str, str], source: Path, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run classes (name -> model type) and yield what came of each, as it comes."""
    from tests.zoo.converter_server import install, serving
    from tests.zoo.run import prepare, run_all

    began = time.monotonic()
    folder = tempfile.TemporaryDirectory(prefix="pt2-zoo-")
    with folder, serving(Path(folder.name), source) as socket:
        prepare()
        from tests.zoo.plain import plain_path
        from tests.zoo.whole import whole

        def work(place: Path, name: str, kind: str) -> dict[str, Any]:
            install(socket)
            if args.plain:
                return plain_path(place, name, kind)
            return whole(place, name, kind, args.keep)

        yield from run_all(work, classes.items(), args.jobs)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
