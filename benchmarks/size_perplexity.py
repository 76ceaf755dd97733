"""Size against perplexity: our files beside those that llama-quantize makes of the same model.

    python benchmarks/size_perplexity.py MODEL -o OUT --text wiki.test.txt,austen.test.txt \\
        --imatrix-text calib.txt --ours best=best.gguf,refined=refined.gguf
    python benchmarks/size_perplexity.py --show OUT/sizes.json -o OUT      table and plot again

Converts MODEL to bf16, takes an importance matrix from --imatrix-text, quantises with every one of
--types, and scores all files with `llama-perplexity -c 512` on every text, with the build that
`pt2-llama build` made (--variant cuda for the GPU's). OUT gets the files, sizes.json after every
one of them, and at the end sizes.md and sizes.png.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantize.common import ArgumentParser, PT2Error, atomic_path, read_json, run_cli, write_json

TYPES = "IQ1_S,IQ1_M,IQ2_XXS,IQ2_XS,Q2_K,Q2_0,TQ2_0"
FINAL = re.compile(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)")
BASE, RIVAL, OURS = "bf16", "llama-quantize", "pt2"
TRIES = 3  # llama-perplexity's last line gets lost now and then
SHOWN = 2.0  # ratios above it stand in the table only


def run(command: list[str], env: dict[str, str]) -> str:
    """What a program printed.

    Raises:
        PT2Error: it failed.
    """
    print("$", *command, flush=True)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PT2Error(f"{Path(command[0]).name} failed: {lines[-1] if lines else 'no output'}")
    return done.stdout + done.stderr


def perplexity(build: Any, file: Path, text: Path, options: list[str]) -> tuple[float, float]:
    """llama-perplexity's final estimate and its standard error."""
    tool = str(build.tool("llama-perplexity"))
    for _ in range(TRIES):
        said = run([tool, "-m", str(file), "-f", str(text), "-c", "512", *options], build.env())
        if match := FINAL.search(said):
            return float(match[1]), float(match[2])
    raise PT2Error(f"llama-perplexity printed no final estimate for {file}")


def rivals(build: Any, model: Path, out: Path, args: Any, options: list[str]) -> dict[str, Path]:
    """The bf16 file and one for every type, by name; those that are there are kept."""
    from third_party.pt2_llama import api

    base = out / "bf16.gguf"
    if not base.is_file():
        script = api.source_dir() / "convert_hf_to_gguf.py"
        env = {**build.env(), "PYTHONPATH": str(script.parent / "gguf-py")}
        run([sys.executable, str(script), str(model), "--outtype", "bf16", "--outfile", str(base)],
            env)  # fmt: skip
    matrix = out / "imatrix.gguf"
    if not matrix.is_file():
        chunks = ["--chunks", str(args.imatrix_chunks)] if args.imatrix_chunks else []
        run([str(build.tool("llama-imatrix")), "-m", str(base), "-f", args.imatrix_text,
             "-c", "512", "-o", str(matrix), *options, *chunks], build.env())  # fmt: skip
    files = {BASE: base}
    for kind in args.types.split(","):
        file = out / f"{kind}.gguf"
        if not file.is_file():
            tool = str(build.tool("llama-quantize"))
            run([tool, "--imatrix", str(matrix), str(base), str(file), kind], build.env())
        files[kind] = file
    return files


def own_files(given: str) -> dict[str, Path]:
    """``NAME=FILE,...`` as a dictionary.

    Raises:
        PT2Error: a pair has no name, or its file is not there.
    """
    files = {}
    for pair in filter(None, given.split(",")):
        name, mark, file = pair.partition("=")
        if not mark or not Path(file).is_file():
            raise PT2Error(f"--ours wants NAME=FILE,..., and {pair!r} names no file")
        files[name] = Path(file)
    return files


def measure(args: Any) -> dict[str, Any]:
    """Make and score everything; returns what is written to sizes.json."""
    from third_party.pt2_llama import api

    build = api.require_build(args.variant)
    model, out = Path(args.model), args.out
    gpu = ["-ngl", "99" if args.variant == "cuda" else "0"]
    chunks = ["--chunks", str(args.chunks)] if args.chunks else []
    ours = own_files(args.ours)
    files = [(n, BASE if n == BASE else RIVAL, f)
             for n, f in rivals(build, model, out, args, gpu).items()]  # fmt: skip
    files += [(name, OURS, file) for name, file in ours.items()]
    rows: list[dict[str, Any]] = []
    texts = [Path(t).name for t in args.text.split(",")]
    results = {
        "model": model.resolve().name, "build": build.describe(), "texts": texts, "files": rows
    }  # fmt: skip
    for name, kind, file in files:
        row: dict[str, Any] = {
            "name": name, "kind": kind, "bytes": file.stat().st_size, "texts": {}
        }  # fmt: skip
        for text in map(Path, args.text.split(",")):
            value, error = perplexity(build, file, text, [*gpu, *chunks])
            row["texts"][text.name] = {"perplexity": value, "error": error}
        rows.append(row)
        write_json(out / "sizes.json", results)
    return results


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
    ax.set_title(f"{results['model']}: size against perplexity", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    with atomic_path(path) as tmp:
        fig.savefig(tmp, format="png", bbox_inches="tight")
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="size_perplexity.py", description=__doc__)
    parser.add_argument("model", nargs="?", help="folder of the Hugging Face model")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--text", help="to score, with commas; the plot shows the first")
    parser.add_argument("--imatrix-text", help="for the importance matrix")
    parser.add_argument("--imatrix-chunks", type=int, default=0, help="of 512 tokens (all)")
    parser.add_argument("--types", default=TYPES, help=f"of llama-quantize ({TYPES})")
    parser.add_argument("--ours", default="", help="NAME=FILE.gguf, with commas")
    parser.add_argument("--chunks", type=int, default=0, help="windows to score (all)")
    parser.add_argument("--variant", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--show", type=Path, help="a sizes.json: only table and plot of it")
    args = parser.parse_args(argv)
    missing = [n for n in ("model", "text", "imatrix_text") if getattr(args, n) is None]
    if missing and not args.show:
        raise PT2Error(f"--{missing[0].replace('_', '-')} is missing: see --help")
    args.out.mkdir(parents=True, exist_ok=True)
    results = read_json(args.show) if args.show else measure(args)
    try:
        page = table(results)  # also tells whether the file is one of ours
    except (KeyError, TypeError, StopIteration, IndexError) as e:
        raise PT2Error(f"{args.show} is not a table of this program: {e!r}") from e
    with atomic_path(args.out / "sizes.md") as tmp:
        tmp.write_text(page, encoding="utf-8")
    plot(results, args.out / "sizes.png")
    print(page, end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli("size_perplexity", main))
