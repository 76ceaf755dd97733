"""Size against perplexity on several texts: one table and plot of what pt2-bench measured.

    for t in wiki.test austen.test; do
        pt2-bench best.gguf refined.gguf --source MODEL --imatrix-text calib.txt --text $t.txt \\
            --baseline bf16,iq1_s,iq1_m,iq2_xxs,iq2_xs,q2_k,q2_0 -p 8 -n 1 --pg none -r 1 --out $t
    done
    python benchmarks/size_perplexity.py wiki.test/results.json austen.test/results.json -o OUT
    python benchmarks/size_perplexity.py OUT/sizes.json -o OUT             table and plot again

Perplexities are those of llama.cpp's protocol, ratios to the bf16 file's; files that were given to
pt2-bench are ours, those that it made are llama-quantize's. OUT gets sizes.json, sizes.md and
sizes.png, which shows the first text.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamacpp_bench import load_results
from llamacpp_bench.results import Model, Results
from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, read_json, write_json

BASE, RIVAL, OURS = "bf16", "llama-quantize", "pt2"
PROTOCOL = "llama.cpp"
SHOWN = 2.0  # ratios above it stand in the table only


def kind(model: Model) -> str:
    """The full-precision file, one of llama-quantize's, or one of ours."""
    if model.main_type == "BF16":
        return BASE
    return OURS if model.origin == "given" else RIVAL


def join(runs: Sequence[Results]) -> dict[str, Any]:
    """Runs of pt2-bench on the same model, one for each text, as sizes.json has them.

    Raises:
        PT2Error: a run read no text, two read the same, or none has the bf16 file.
    """
    texts: list[str] = []
    files: dict[str, dict[str, Any]] = {}
    for run in runs:
        text = Path(run.config.get("text") or "").name
        if not text or text in texts:
            raise PT2Error(f"every results.json must be of a text of its own, not of {text!r}")
        texts.append(text)
        for model in run.models:
            row = files.setdefault(
                model.name,
                {"name": model.name, "kind": kind(model), "bytes": model.file_bytes, "texts": {}},
            )
            for p in model.perplexity:
                if p.protocol == PROTOCOL:
                    row["texts"][text] = {"perplexity": p.ppl, "error": p.error}
    if not any(row["kind"] == BASE for row in files.values()):
        raise PT2Error("no bf16 file was measured: give pt2-bench --baseline bf16,...")
    return {"build": runs[0].build["description"], "texts": texts, "files": list(files.values())}


def ratio(results: dict[str, Any], row: dict[str, Any], text: str) -> float | None:
    """A file's perplexity over bf16's, None where it was not measured."""
    full = next(r for r in results["files"] if r["kind"] == BASE)["texts"][text]["perplexity"]
    measured = row["texts"].get(text)
    return measured["perplexity"] / full if measured else None


def table(results: dict[str, Any]) -> str:
    """All files by size, as Markdown."""
    texts = results["texts"]
    lines = [f"| file | bytes | {' | '.join(f'{t} | ratio' for t in texts)} |",
             "|---|---|" + "---|---|" * len(texts)]  # fmt: skip
    for row in sorted(results["files"], key=lambda r: r["bytes"]):
        cells = [f"{row['name']}" if row["kind"] == RIVAL else f"**{row['name']}**"]
        cells.append(f"{row['bytes']:,}")
        for text in texts:
            r = ratio(results, row, text)
            cells += ["", ""] if r is None else [f"{row['texts'][text]['perplexity']:.2f}",
                                                 f"{r:.3f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Size against the ratio on the first text, ours and llama-quantize's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    text = results["texts"][0]
    fig, ax = plt.subplots(figsize=(7.5, 4.5), dpi=110)
    for kind, colour, marker in ((RIVAL, "#8A8A8A", "o"), (OURS, "#0072B2", "s")):
        points = sorted(
            (row["bytes"] / 1e6, r, row["name"])
            for row in results["files"]
            if row["kind"] == kind and (r := ratio(results, row, text)) is not None and r < SHOWN
        )
        ax.plot([p[0] for p in points], [p[1] for p in points], marker, color=colour, label=kind)
        for x, y, name in points:
            ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", color=colour)
    ax.axhline(1.0, color="#333333", linewidth=0.8, linestyle=":")
    ax.margins(x=0.12)
    ax.set(xlabel="file, MB", ylabel=f"perplexity over bf16's, {text}")
    ax.set_title("Size against perplexity", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", bbox_inches="tight")
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="size_perplexity.py", description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="results.json")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args(argv)
    first = read_json(args.results[0])
    joined = isinstance(first, dict) and "files" in first
    results = first if joined else join([load_results(file) for file in args.results])
    try:
        page = table(results)
    except (KeyError, TypeError, StopIteration) as e:
        raise PT2Error(f"{args.results[0]} lacks something: {e!r}") from e
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "sizes.json", results)
    with atomic_path(args.out / "sizes.md") as tmp:
        tmp.write_text(page, encoding="utf-8")
    plot(results, args.out / "sizes.png")
    print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("size_perplexity", main))
