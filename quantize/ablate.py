"""The ablations of the paper and our own, in one command: a table of perplexities.

    python -m quantize.ablate MODEL --calibration calib.txt --text wiki.valid.txt -o OUT
    python -m quantize.ablate MODEL --calibration tokens.safetensors:calibration \\
        --text tokens.safetensors:valid --seqlen 512 -o OUT --device cuda
    python -m quantize.ablate MODEL ... -o OUT --only fp,paper,default
    python -m quantize.ablate --list

Every variant is a full run of the quantiser (the activations of a block come from the blocks that
were quantised before it, so nothing can be shared) followed by the perplexity of its weights over
windows of --ctx tokens, all tokens scored. OUT/ablation.json and OUT/ablation.md are written anew
after every variant; a variant that is there already, made with the same settings, is not run again.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, human_seconds, read_json, write_json
from pt2_core.process.locks import folder_lock
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import Reporter, open_reporter
from pt2_core.schema import Mismatch, anything, mapping, number, record, sequence, text
from quantize.config import BEST, DEVICES, DTYPES, Config

RESULTS = "ablation.json"
TABLE = "ablation.md"


@dataclass(frozen=True)
class Variant:
    """One row of the table: what differs from the paper's method in natural order."""

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    sample_factor: float = 1.0

    def config(self, base: dict[str, Any]) -> Config:
        """The run's settings: the paper's method, natural order, and this variant's changes."""
        samples = max(1, round(base["samples"] * self.sample_factor))
        start = {**base, "samples": samples, "order": "none", "reround": 0}
        return Config(**{**start, **self.settings})


OURS = {"order": "foldable", "reround": 1}
OUR_BEST = {**OURS, **BEST}
ANNEALED = {**OUR_BEST, "sequential": False, "asymmetry": 0, "stream": 0}
VARIANTS = (
    Variant("nocomp", "ITF + AGA, no compensation", {"compensate": False}),
    Variant("none", "compensation; neither ITF nor AGA", {"itf": False, "aga": False}),
    Variant("itf", "compensation, ITF", {"aga": False}),
    Variant("aga", "compensation, AGA", {"itf": False}),
    Variant("itf-aga", "compensation, ITF + AGA, natural order"),
    Variant("random", "... random order", {"order": "random"}),
    Variant("hessian", "... Hessian order", {"order": "hessian"}),
    Variant("paper", "... SSR order (the paper)", {"order": "ssr"}),
    Variant("foldable", "... foldable order", {"order": "foldable"}),
    Variant("reround", "T re-rounded, AGA again; natural order", {"reround": 1}),
    Variant("reround-hessian", "... Hessian order", {"reround": 1, "order": "hessian"}),
    Variant("reround-ssr", "... SSR order", {"reround": 1, "order": "ssr"}),
    Variant("default", "... foldable order (the recipe fast)", OURS),
    Variant("reround3", "fast, re-rounded 3 times", {**OURS, "reround": 3}),
    Variant("block64", "fast, block 64", {**OURS, "block_size": 64}),
    Variant("block256", "fast, block 256", {**OURS, "block_size": 256}),
    Variant("damp10", "fast, 10% damping", {**OURS, "damping": 0.1}),
    Variant("damp01", "fast, 0.1% damping", {**OURS, "damping": 0.001}),
    Variant("half", "fast, half the calibration", OURS, 0.5),
    Variant("double", "fast, twice the calibration", OURS, 2.0),
    Variant("grid", "fast, then the grid of whole rows", {**OURS, "rounds": 1, "sweeps": 0}),
    Variant("descent", "... and T by descent, in turn", {**OURS, "rounds": 2, "sweeps": 4}),
    Variant("anneal", "... annealed", ANNEALED),
    Variant("sequential", "... Hessians site by site", {**ANNEALED, "sequential": True}),
    Variant("asymmetry", "... half of the inputs' error made up for", {**OUR_BEST, "stream": 0}),
    Variant("best", "... and of the residual stream's (the recipe best)", OUR_BEST),
    Variant("best-all", "best, all of both errors", {**OUR_BEST, "asymmetry": 1, "stream": 1}),
    Variant("best-at-once", "best, Hessians at once", {**OUR_BEST, "sequential": False}),
    Variant("best-plain", "best, not annealed", {**OUR_BEST, "noise": 0}),
    Variant("best-half", "best, half the calibration", OUR_BEST, 0.5),
    Variant("best-double", "best, twice the calibration", OUR_BEST, 2.0),
)


def ablate(
    model: str, out: Path, base: dict[str, Any], text: str, ctx: int, names: list[str],
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run variants and write the table after each.

    Args:
        base: settings that all variants share (calibration, samples, seqlen, device, ...).
        names: ``fp`` and names of :data:`VARIANTS`, in the order of the table.

    Returns:
        one record per variant: name, title, perplexity, ratio to full precision, seconds.

    Raises:
        PT2Error: of the quantiser; a variant for which there is too little text is left out with
            its reason, the others go on.
    """
    from quantize.evaluate import perplexity, windows

    reporter = reporter or Reporter()
    tokens = windows(
        text, model, ctx, "papers", reporter=reporter, allow_long=base.get("allow_long", False)
    )
    machine = {k: base[k] for k in ("device", "dtype", "threads", "batch_size")}
    rows: list[dict[str, Any]] = []
    known = _known(out)
    shared = {"model": Path(model).resolve().name, "text": Path(text).name, "ctx": ctx}

    def score(artifact: Path | None) -> float:
        return perplexity(model, tokens, artifact=artifact, reporter=reporter, **machine).perplexity

    for variant in [v for v in (FULL, *VARIANTS) if v.name in names]:
        config = variant.config(base)
        settings = {**shared, **({} if variant is FULL else config.identity())}
        row = known.get(variant.name)
        if row is None or row["settings"] != settings:
            reporter.note(f"variant {variant.name}: {variant.title}")
            row = {"name": variant.name, "title": variant.title, "settings": settings}
            try:
                row.update(_measure(model, out, variant, config, score, reporter))
            except PT2Error as e:
                if variant.sample_factor <= 1:
                    raise
                reporter.warn(f"{variant.name} is left out: {e}")
                continue
        rows.append(row)
        _write(out, rows)
    return rows


def _measure(
    model: str, out: Path, variant: Variant, config: Config, score: Any, reporter: Reporter
) -> dict[str, Any]:
    if variant is FULL:
        return {"perplexity": score(None), "seconds": 0.0}
    from quantize.pipeline import ternarize

    with temporary_folder(out, f".{variant.name}-") as work:
        folder = work / "artifact"
        began = time.monotonic()
        result = ternarize(model, folder, config, overwrite=True, reporter=reporter)
        seconds = time.monotonic() - began
        totals = {
            key: sum(m["E_x"][key] for m in result.matrices.values())
            / sum(m["norm_x"] for m in result.matrices.values())
            for key in next(iter(result.matrices.values()))["E_x"]
        }
        return {"perplexity": score(folder), "seconds": seconds, "E_x": totals}


FULL = Variant("fp", "full precision")


def _known(out: Path) -> dict[str, dict[str, Any]]:
    if not (out / RESULTS).is_file():
        return {}
    rows = read_json(out / RESULTS)
    row = {"name": text(), "title": text(), "settings": mapping(anything),
           "perplexity": number(0), "seconds": number(0)}  # fmt: skip
    more = {"E_x": record({"final": number(0)})}
    try:
        sequence(record(row, more))(rows, "rows")
    except Mismatch as e:
        raise PT2Error(f"{out / RESULTS} is not a table of this program ({e}); remove it") from e
    return {r["name"]: r for r in rows}


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    write_json(out / RESULTS, rows)
    with atomic_path(out / TABLE) as tmp:
        tmp.write_text(markdown(rows), encoding="utf-8")


def markdown(rows: list[dict[str, Any]]) -> str:
    """The records as a Markdown table; the ratio is to the ``fp`` row, if there is one."""
    full = next((r["perplexity"] for r in rows if r["name"] == "fp"), None)
    lines = ["| variant | perplexity | ratio to FP | E_x | seconds |", "|---|---|---|---|---|"]
    for r in rows:
        ratio = f"{r['perplexity'] / full:.3f}" if full else ""
        error = f"{r['E_x']['final']:.4f}" if "E_x" in r else ""
        seconds = f"{r['seconds']:.0f}" if r["seconds"] else ""
        lines.append(f"| {r['title']} | {r['perplexity']:.2f} | {ratio} | {error} | {seconds} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m quantize.ablate``."""
    head, _, rest = __doc__.partition("\n\n")
    parser = ArgumentParser(
        prog="python -m quantize.ablate", description=head, epilog="examples:\n" + rest
    )
    parser.add_argument("model", nargs="?", help="folder of the Hugging Face model")
    parser.add_argument("-o", "--out", help="folder of the results")
    parser.add_argument("--calibration", help="as for pt2-quantize")
    parser.add_argument("--text-field", metavar="NAME", help="of --calibration's JSON records")
    parser.add_argument("--text", help="to score: as for python -m quantize.evaluate")
    parser.add_argument("--allow-long", action="store_true", help="windows beyond the context")
    parser.add_argument("--ctx", type=int, default=512, help="tokens in a scored window (512)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names, separated by commas (default: all)")
    parser.add_argument("--list", action="store_true", help="show the variants' names")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)
    # Variants that are in the table already are not measured again.
    again = command("python", "-m", "quantize.ablate", *(sys.argv[1:] if argv is None else argv))
    return run_cli(
        "quantize.ablate",
        lambda: _run(args),
        lower="--batch-size, --samples or --seqlen",
        resume=lambda: again,
    )


def _run(args: Any) -> int:
    everything = (FULL, *VARIANTS)
    if args.list:
        print("\n".join(f"{v.name:16} {v.title}" for v in everything))
        return 0
    missing = [n for n in ("model", "out", "calibration", "text") if not getattr(args, n)]
    if missing:
        raise PT2Error(f"{missing[0]} is missing: see python -m quantize.ablate --help")
    if args.ctx < 2:
        raise PT2Error("--ctx must be at least 2")
    names = args.only.split(",") if args.only else [v.name for v in everything]
    unknown = [n for n in names if n not in {v.name for v in everything}]
    if unknown:
        raise PT2Error(f"no variant {unknown[0]!r}: see python -m quantize.ablate --list")
    keys = ("calibration", "text_field", "samples", "seqlen", "allow_long", "seed", "device",
            "dtype", "threads", "batch_size")  # fmt: skip
    base = {k: getattr(args, k) for k in keys}
    out = Path(args.out)
    check_threads(args.threads)
    began = time.monotonic()
    with folder_lock(out), open_reporter() as reporter:
        rows = ablate(args.model, out, base, args.text, args.ctx, names, reporter)
    print(markdown(rows), end="")
    print(f"\n{human_seconds(time.monotonic() - began)}; also in {out / TABLE} and {out / RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
