"""The PT2-LLM paper's tables 1 and 2, with our quantiser, for any model and any text.

    python benchmarks/paper_tables.py Llama-2-7b-hf -o out --device cuda --dtype float16 \\
        --published llama-2-7b
    python benchmarks/paper_tables.py wiki-llama-7m -o out --text wiki.test.txt --tasks none \\
        --calibration calib.txt --samples 64 --seqlen 512 --ctx 512 --tables 1,2a,2b

Table 1: the full-precision model and what pt2-quantize makes of it, by recipe. Table 2, all from
the paper's recipe: (a) ITF and AGA, (b) the columns' order, (c) how much calibration text, (d)
which. Each variant is quantised, measured with pt2-eval's functions (perplexity over windows of
--ctx tokens, the seven zero-shot tasks) and removed again; OUT/tables.json and OUT/tables.md are
written after each, and a variant that is there already with the same settings is not run again.
With LLaMA weights and a connection the defaults are the paper's own settings; --published puts its
figures beside ours.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, human_seconds, read_json, write_json
from pt2_core.progress import open_reporter
from pt2_core.texts.sources import Text, read_text, split_sources
from pt2_core.texts.tokens import check_context, paper_windows
from pt2_eval.measure import perplexity
from pt2_eval.models import open_model
from pt2_eval.tasks import PAPER_TASKS, zero_shot
from quantize.config import DEVICES, DTYPES, load_recipe
from quantize.model.torch_setup import arithmetic
from quantize.pipeline import ternarize

RESULTS, PAGE = "tables.json", "tables.md"
TITLES = {
    "1": "Table 1: recipes", "2a": "Table 2a: ITF and AGA", "2b": "Table 2b: order of the columns",
    "2c": "Table 2c: calibration windows", "2d": "Table 2d: calibration text",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One row; ``recipe`` None is the model as it is."""

    table: str
    title: str
    recipe: str | None = "paper"
    settings: dict[str, Any] = field(default_factory=dict)


VARIANTS = (
    Variant("1", "full precision", None),
    Variant("1", "paper"),
    Variant("1", "fast", "fast"),
    Variant("1", "best", "best"),
    Variant("2a", "neither", settings={"itf": False, "aga": False}),
    Variant("2a", "ITF", settings={"aga": False}),
    Variant("2a", "AGA", settings={"itf": False}),
    Variant("2a", "both"),
    Variant("2b", "none", settings={"order": "none"}),
    Variant("2b", "random", settings={"order": "random"}),
    Variant("2b", "Hessian", settings={"order": "hessian"}),
    Variant("2b", "SSR"),
    Variant("2c", "64", settings={"samples": 64}),
    Variant("2c", "128", settings={"samples": 128}),
    Variant("2c", "256", settings={"samples": 256}),
    Variant("2d", "wikitext2", settings={"calibration": "wikitext2"}),
    Variant("2d", "c4", settings={"calibration": "c4"}),
    Variant("2d", "ptb", settings={"calibration": "ptb"}),
)

# The paper's figures: (WikiText-2, C4, average accuracy) by table and row.
Published = dict[tuple[str, str], tuple[float, float, float]]
_L2 = (11.56, 24.38, 43.33)
_L3 = (32.19, 129.83, 37.79)
PUBLISHED: dict[str, Published] = {
    "llama-7b": {
        ("1", "full precision"): (5.68, 7.34, 61.73), ("1", "paper"): (11.39, 24.55, 45.07),
    },
    "llama-13b": {
        ("1", "full precision"): (5.09, 6.80, 63.81), ("1", "paper"): (9.11, 17.32, 48.64),
    },
    "llama-65b": {
        ("1", "full precision"): (3.53, 5.81, 68.64), ("1", "paper"): (6.62, 9.17, 55.95),
    },
    "llama-2-70b": {
        ("1", "full precision"): (3.32, 5.71, 69.01), ("1", "paper"): (6.27, 12.00, 55.87),
    },
    "qwen3-14b-base": {
        ("1", "full precision"): (6.38, 9.68, 68.13), ("1", "paper"): (16.48, 68.13, 45.11),
    },
    "llama-2-7b": {
        ("1", "full precision"): (5.47, 7.26, 61.85), ("1", "paper"): _L2,
        ("2a", "neither"): (22.88, 222.17, 37.11), ("2a", "ITF"): (15.47, 34.17, 38.12),
        ("2a", "AGA"): (12.25, 26.17, 42.86), ("2a", "both"): _L2,
        ("2b", "none"): (13.06, 27.66, 41.37), ("2b", "random"): (12.84, 28.24, 40.86),
        ("2b", "Hessian"): (12.35, 25.44, 39.15), ("2b", "SSR"): _L2,
        ("2c", "64"): (11.92, 25.27, 43.31), ("2c", "128"): _L2,
        ("2c", "256"): (11.35, 23.52, 43.55), ("2d", "wikitext2"): _L2,
        ("2d", "c4"): (18.94, 20.15, 43.32), ("2d", "ptb"): (27.52, 35.15, 41.15),
    },
    "llama-3-8b": {
        ("1", "full precision"): (6.14, 9.45, 65.59), ("1", "paper"): _L3,
        ("2a", "neither"): (247.75, 1227.94, 33.26), ("2a", "ITF"): (83.76, 1039.80, 33.90),
        ("2a", "AGA"): (47.83, 520.14, 35.29), ("2a", "both"): _L3,
        ("2b", "none"): (112.83, 599.19, 33.08), ("2b", "random"): (113.42, 466.07, 33.37),
        ("2b", "Hessian"): (35.86, 131.33, 37.31), ("2b", "SSR"): _L3,
        ("2c", "64"): (38.90, 252.19, 35.20), ("2c", "128"): _L3,
        ("2c", "256"): (32.25, 167.48, 37.95), ("2d", "wikitext2"): _L3,
        ("2d", "c4"): (168.81, 72.00, 37.80), ("2d", "ptb"): (428.97, 579.57, 35.21),
    },
}  # fmt: skip


def measure(
    model: str, variant: Variant, args: Any, texts: list[Text], folder: Path
) -> dict[str, Any]:
    """Quantise one variant and measure it.

    Returns:
        perplexities by text, accuracies by task, seconds of the quantisation.
    """
    reporter = open_reporter()
    path, seconds = model, 0.0
    with tempfile.TemporaryDirectory(dir=folder, prefix=".variant-") as work:
        if variant.recipe is not None:
            began = time.monotonic()
            ternarize(model, work, load_recipe(variant.recipe, **_settings(variant, args)),
                      overwrite=True, reporter=reporter)  # fmt: skip
            path, seconds = work, time.monotonic() - began
        with arithmetic(args.threads):
            opened = open_model(path, source=model, device=args.device, dtype=args.dtype)
            result: dict[str, Any] = {"seconds": seconds, "perplexity": {}, "tasks": {}}
            for text in texts:
                limit = args.chunks or text.windows
                windows = paper_windows(opened.encode(text.text), opened.bos, args.ctx, limit)
                check_context(windows.shape[1], opened.context, opened.name, "--ctx",
                              allow=args.allow_long, warn=reporter.warn)  # fmt: skip
                score = perplexity(opened, windows, second_half=False, batch=args.batch_size)
                result["perplexity"][text.label] = score.value
            if args.tasks != "none":
                names = list(PAPER_TASKS) if args.tasks == "paper" else args.tasks.split(",")
                result["tasks"] = zero_shot(opened, names, limit=args.limit)
    return result


def _settings(variant: Variant, args: Any) -> dict[str, Any]:
    shared = {k: getattr(args, k) for k in ("calibration", "samples", "seqlen", "device", "dtype",
                                            "threads", "seed")}  # fmt: skip
    return {**shared, **variant.settings}


def tables(model: str, args: Any) -> list[dict[str, Any]]:
    """Run all variants of the wanted tables; returns their records."""
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    texts = [read_text(s, "test") for s in split_sources(args.text)]
    wanted = args.tables.split(",")
    if unknown := [t for t in wanted if t not in (*TITLES, "2")]:
        raise PT2Error(f"--tables {unknown[0]}: known are {', '.join(TITLES)} and 2 for all of it")
    chosen = [v for v in VARIANTS if v.table in wanted or (v.table[0] == "2" and "2" in wanted)]
    known = read_json(out / RESULTS) if (out / RESULTS).is_file() else []
    rows: list[dict[str, Any]] = []
    for variant in chosen:
        keys = ("text", "tasks", "ctx", "chunks", "limit")
        made = {**_settings(variant, args), **{k: getattr(args, k) for k in keys},
                "recipe": variant.recipe, "model": Path(model).resolve().name}  # fmt: skip
        same = next((r for r in [*known, *rows] if r["settings"] == made), None)
        if same is None:
            print(f"table {variant.table}: {variant.title}", file=sys.stderr, flush=True)
            try:
                same = measure(model, variant, args, texts, out)
            except PT2Error as e:
                if not variant.settings:
                    raise
                print(f"left out: {e}", file=sys.stderr, flush=True)  # a text that is not there
                continue
        figures = {k: same[k] for k in ("seconds", "perplexity", "tasks")}
        rows.append({"table": variant.table, "title": variant.title, "settings": made, **figures})
        write_json(out / RESULTS, rows)
        with atomic_path(out / PAGE) as tmp:
            tmp.write_text(page(rows, PUBLISHED.get(args.published or "", {})), encoding="utf-8")
    return rows


def page(rows: list[dict[str, Any]], published: Published) -> str:
    """All tables as Markdown; ratios are to the full-precision row."""
    full = next((r for r in rows if r["title"] == "full precision"), None)
    parts = []
    for table, title in TITLES.items():
        members = [r for r in rows if r["table"] == table]
        if not members:
            continue
        texts, tasks = list(members[0]["perplexity"]), list(members[0]["tasks"])
        head = ["", *texts, *tasks, *(["average"] if tasks else []), "time",
                *(["the paper: WikiText-2, C4, average"] if published else [])]  # fmt: skip
        lines = [f"## {title}\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for r in members:
            cells = [r["title"], *(_ratio(r, full, t) for t in texts)]
            scores = [r["tasks"][t].get("acc", float("nan")) for t in tasks]
            cells += [f"{100 * s:.2f}" for s in scores]
            cells += [f"{100 * sum(scores) / len(scores):.2f}"] if scores else []
            cells.append(human_seconds(r["seconds"]) if r["seconds"] else "")
            if published:
                theirs = published.get((table, r["title"]))
                cells.append(", ".join(f"{x:.2f}" for x in theirs) if theirs else "")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _ratio(row: dict[str, Any], full: dict[str, Any] | None, text: str) -> str:
    value = row["perplexity"][text]
    if full is None or row is full or text not in full["perplexity"]:
        return f"{value:.2f}"
    return f"{value:.2f} ({value / full['perplexity'][text]:.3f}x)"


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="paper_tables.py", description=__doc__)
    parser.add_argument("model", help="folder of the Hugging Face model")
    parser.add_argument("-o", "--out", type=Path, default=Path("out/paper-tables"))
    parser.add_argument("--tables", default="1,2", help="1, 2, 2a, 2b, 2c, 2d (1,2)")
    parser.add_argument("--allow-long", action="store_true", help="windows beyond the context")
    parser.add_argument("--text", default="wikitext2,c4", help="test texts (wikitext2,c4)")
    parser.add_argument("--tasks", default="paper", help="paper, none, or names (paper)")
    parser.add_argument("--ctx", type=int, default=2048, help="tokens in a window (2048)")
    parser.add_argument("--chunks", type=int, help="first windows of each text only")
    parser.add_argument("--limit", type=int, help="first questions of each task only")
    parser.add_argument("--published", choices=tuple(PUBLISHED), help="figures to put beside ours")
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)
    rows = tables(args.model, args)
    print(page(rows, PUBLISHED.get(args.published or "", {})), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("paper_tables", main))
