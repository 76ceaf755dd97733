"""The whole path on the example model: quantise, export, generate, measure, one page of results.

    make demo            (or: python examples/demo.py [OUT], default out/demo)

Every step prints the command it runs, so that it can be repeated by hand on another model. Steps
whose output is there are skipped; delete OUT to start over. Needs `pt2-llama build`, which make
demo does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE / "wiki-llama-7m"
CALIBRATION = HERE / "text" / "calibration.txt"
TEXT = HERE / "text" / "wiki.test.txt"
TYPES = ("tq2_1", "tq1_1", "q2_k")
PROMPT = "The history of the city begins with"


def run(*command: object, capture: bool = False) -> str:
    """Print a command, run it, stop the demo if it fails; its standard output if asked for."""
    words = [str(c) for c in command]
    here = str(Path.cwd()) + os.sep
    shown = [w.removeprefix(here) for w in words]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        sys.exit(f"demo: {words[0]} failed with exit status {done.returncode}")
    return done.stdout or ""


def quantize(out: Path) -> Path:
    """The artifact; a run that was interrupted is taken up again."""
    artifact = out / "artifact"
    finished = out / "errors.png"
    if not finished.exists():
        run(
            *("pt2-quantize", MODEL, "-o", artifact, "--calibration", CALIBRATION),
            *("--samples", 64, "--seqlen", 512, "--device", "cpu", "--report", finished),
            *(["--resume"] if (artifact / "manifest.json").exists() else []),
        )
    return artifact


def export(out: Path, artifact: Path) -> list[Path]:
    files = [out / f"wiki-llama-7m-{kind}.gguf" for kind in TYPES]
    for kind, file in zip(TYPES, files, strict=True):
        if not file.exists():
            run("pt2-export", file, "--from", artifact, "--model", MODEL, "--type", kind)
    return files


def generate(files: list[Path]) -> dict[str, str]:
    """What llama-cli writes after the prompt, greedily, from each file."""
    texts = {}
    for file in files:
        said = run(
            *("pt2-llama", "run", "llama-cli", "-m", file, "-p", PROMPT, "-n", 48, "--temp", 0),
            *("--single-turn", "--no-display-prompt", "--simple-io", "--no-show-timings"),
            *("--threads", os.cpu_count() or 2),
            capture=True,
        )
        texts[file.name] = answer(said)
        print(f"{PROMPT} {texts[file.name]}")
    return texts


def answer(said: str) -> str:
    """The generated text without llama-cli's banner and farewell."""
    text = said.split(f"> {PROMPT}", 1)[-1]
    return " ".join(text.replace("Exiting...", "").split())


def bench(out: Path, files: list[Path]) -> Path:
    folder = out / "bench"
    run(
        *("pt2-bench", *files, "--baseline", "q2_k,iq1_m", "--source", MODEL),
        *("--imatrix-text", CALIBRATION, "--text", TEXT, "--chunks", 40, "--out", folder),
    )
    return folder


def write_page(out: Path, texts: dict[str, str], folder: Path, seconds: float) -> Path:
    """One page: the text, the table and the plots of the bench."""
    results = (folder / "results.md").read_text(encoding="utf-8").replace("](", "](bench/")
    results = results.replace("# pt2-bench", "## Measured by pt2-bench", 1)
    quotes = "\n\n".join(f"**{name}**: {PROMPT} *{text}*" for name, text in texts.items())
    page = out / "results.md"
    page.write_text(
        "# The demo's results\n\n"
        "wiki-llama-7m has 6.8 M parameters. Ternary weights cost so small a model much more than "
        "a real one, and a model that fits into the cache says little about speed: this page shows "
        "that everything works; benchmarks/ and docs/quality.md have figures.\n\n"
        f"## Text\n\n{quotes}\n\n## Errors per block and stage\n\n![errors](errors.png)\n\n"
        f"{results}\n\nMade by `make demo` in {seconds:.0f} s (without the build).\n",
        encoding="utf-8",
    )
    return page


def main() -> None:
    start = time.monotonic()
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo").resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = export(out, quantize(out))
    texts = generate(files)
    folder = bench(out, files)
    page = write_page(out, texts, folder, time.monotonic() - start)
    print(f"\nResults on one page: {os.path.relpath(page)}   plots: {os.path.relpath(folder)}/")


if __name__ == "__main__":
    main()
