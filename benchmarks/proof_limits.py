"""How close right files come to the proof: what the limits in export/proof.py are set by.

    python benchmarks/proof_limits.py ARTIFACT... [--types T,T] > limits.md

Exports each artifact in every type, once with embeddings and head in F32 and once with the default
types, and prints the proof's figures as a Markdown table: before and, where the limits ask for it,
after the proof was made anew with the file's own values of what it rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from export import ExportConfig, export_gguf, proof
from pt2_core import formats
from pt2_core.errors import PT2Error

TABLES = {"F32": {"embedding_type": "f32", "output_type": "f32"}, "default": {}}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--types", default=",".join([*formats.TYPES, "q2_k"]))
    args = parser.parse_args()
    print("| artifact | type | embeddings, head | KL | equal top | renewed | export s | proof s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for artifact in args.artifacts:
        for kind in args.types.split(","):
            for name, tables in TABLES.items():
                print(row(artifact, kind, name, tables), flush=True)


def row(artifact: Path, kind: str, name: str, tables: dict[str, str]) -> str:
    """One export as a row of the table."""
    spent = 0.0
    check = proof.check_file

    def timed(*args: object, **more: object) -> proof.Verdict:
        nonlocal spent
        began = time.monotonic()
        try:
            return check(*args, **more)  # type: ignore[arg-type]
        finally:
            spent = time.monotonic() - began

    from export import prove

    prove.check_file = timed  # type: ignore[assignment]
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = ExportConfig(type=kind, **tables)
            verdict = export_gguf(artifact, Path(folder) / "m.gguf", config).proof
    except PT2Error as e:
        return f"| {artifact.name} | {kind} | {name} | refused: {e} | | | | |"
    finally:
        prove.check_file = check
    assert verdict is not None
    d = verdict.difference
    total = time.monotonic() - began
    return (
        f"| {artifact.name} | {kind} | {name} | {d.kl:.4f} | {d.same_top:.1%} | "
        f"{'yes' if verdict.renewed else 'no'} | {total:.1f} | {spent:.2f} |"
    )


if __name__ == "__main__":
    main()
