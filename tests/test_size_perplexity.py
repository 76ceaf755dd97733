"""benchmarks/size_perplexity.py: ratios, table, plot, and reading llama-perplexity's last line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from quantize.common import PT2Error

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks/size_perplexity.py"
spec = importlib.util.spec_from_file_location("size_perplexity", SCRIPT)
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)


def entry(name: str, kind: str, size: int, **texts: float) -> dict:
    scores = {t: {"perplexity": p, "error": 0.1} for t, p in texts.items()}
    return {"name": name, "kind": kind, "bytes": size, "texts": scores}


RESULTS = {
    "model": "m", "build": "b", "texts": ["wiki", "novel"],
    "files": [
        entry("bf16", module.BASE, 1000, wiki=10.0, novel=20.0),
        entry("Q2_K", module.RIVAL, 200, wiki=11.0, novel=23.0),
        entry("mine", module.OURS, 150, wiki=10.5),
        entry("TQ2_0", module.RIVAL, 160, wiki=900.0),
    ],
}  # fmt: skip


def test_table_and_plot_from_a_results_file(tmp_path, capsys):
    (tmp_path / "sizes.json").write_text(json.dumps(RESULTS))
    assert module.main(["--show", str(tmp_path / "sizes.json"), "-o", str(tmp_path)]) == 0
    rows = (tmp_path / "sizes.md").read_text().splitlines()
    assert rows[2] == "| **mine** | 150 | 10.50 | 1.050 |  |  |"
    assert rows[4] == "| Q2_K | 200 | 11.00 | 1.100 | 23.00 | 1.150 |"
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert rows[2] in capsys.readouterr().out


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(PT2Error, match="--imatrix-text is missing"):
        module.main(["model", "-o", str(tmp_path), "--text", "t"])
    with pytest.raises(PT2Error, match="names no file"):
        module.own_files("best=no.gguf")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PT2Error, match="not a table of this program"):
        module.main(["--show", str(tmp_path / "other.json"), "-o", str(tmp_path)])


class Build:
    """A build whose programs are scripts of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tool(self, name: str) -> Path:
        return self.folder / name

    def env(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/bin"}


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_a_lost_last_line_is_asked_for_again(tmp_path):
    tool = tmp_path / "llama-perplexity"
    count = tmp_path / "count"
    line = 'echo "Final estimate: PPL = 12.3456 +/- 0.07890"'
    script(tool, f"echo x >> {count}\n[ $(wc -l < {count}) -gt 1 ] && {line} || true")
    model, text = tmp_path / "m.gguf", tmp_path / "t.txt"
    assert module.perplexity(Build(tmp_path), model, text, []) == (12.3456, 0.0789)
    script(tool, "true")
    with pytest.raises(PT2Error, match="no final estimate"):
        module.perplexity(Build(tmp_path), model, text, [])
    script(tool, "echo something is wrong >&2; exit 3")
    with pytest.raises(PT2Error, match="llama-perplexity failed: something is wrong"):
        module.perplexity(Build(tmp_path), model, text, [])
