"""benchmarks/size_perplexity.py: runs of pt2-bench joined, ratios, table and plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_support import make_results
from scripts import load_script

from llamacpp_bench.results import Perplexity, Results
from pt2_core.errors import PT2Error
from pt2_core.formats import SMALLEST

module = load_script("size_perplexity")


def entry(name: str, kind: str, size: int, **texts: float) -> dict:
    scores = {t: {"perplexity": p, "error": 0.1} for t, p in texts.items()}
    return {"name": name, "kind": kind, "bytes": size, "texts": scores}


SIZES = {
    "build": "b", "texts": ["wiki", "novel"],
    "files": [
        entry("bf16", module.BASE, 1000, wiki=10.0, novel=20.0),
        entry("Q2_K", module.RIVAL, 200, wiki=11.0, novel=23.0),
        entry("mine", module.OURS, 150, wiki=10.5),
        entry("TQ2_0", module.RIVAL, 160, wiki=900.0),
    ],
}  # fmt: skip


def measured(text: str | None, **files: tuple[str, str, float]) -> Results:
    """A run of pt2-bench: name -> type, origin, perplexity in llama.cpp's protocol."""
    results: Results = make_results({name: {} for name in files})
    results.config["text"] = text
    for model in results.models:
        model.main_type, model.origin, ppl = files[model.name]
        model.perplexity = [
            Perplexity("papers", 99.0, 1.0, 2048, 2, 4094),
            Perplexity("llama.cpp", ppl, 0.1, 512, 4, 1020),
        ]
    return results


def run(results: Any, out: Path) -> list[str]:
    file = out / "in.json"
    file.write_text(json.dumps(results))
    assert module.main([str(file), "-o", str(out)]) == 0
    return (out / "sizes.md").read_text().splitlines()


def test_table_and_plot(tmp_path, capsys):
    rows = run(SIZES, tmp_path)
    assert rows[2] == "| **mine** | 150 | 10.50 | 1.050 |  |  |"
    assert rows[4] == "| Q2_K | 200 | 11.00 | 1.100 | 23.00 | 1.150 |"
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert rows[2] in capsys.readouterr().out
    assert json.loads((tmp_path / "sizes.json").read_text()) == SIZES


def test_runs_of_pt2_bench_are_joined(tmp_path):
    full, made = ("BF16", "converted", 10.0), ("Q2_K", "llama-quantize", 12.0)
    wiki = measured("a/wiki.txt", bf16=full, q2=made, best=(SMALLEST.name, "given", 11.0))
    novel = measured("novel.txt", bf16=("BF16", "converted", 20.0), q2=("Q2_K", "x", 30.0))
    for name, results in (("w", wiki), ("n", novel)):
        results.save(tmp_path / f"{name}.json")
    files = [str(tmp_path / "w.json"), str(tmp_path / "n.json")]
    assert module.main([*files, "-o", str(tmp_path)]) == 0
    page = (tmp_path / "sizes.md").read_text()
    assert "| wiki.txt | ratio | novel.txt | ratio |" in page
    assert "| 12.00 | 1.200 | 30.00 | 1.500 |" in page and "| 11.00 | 1.100 |  |  |" in page
    assert "**best**" in page and "**q2**" not in page
    with pytest.raises(PT2Error, match=r"a text of its own, not of 'wiki\.txt'"):
        module.main([files[0], files[0], "-o", str(tmp_path)])
    measured(None, bf16=full).save(tmp_path / "none.json")
    with pytest.raises(PT2Error, match="a text of its own"):
        module.main([str(tmp_path / "none.json"), "-o", str(tmp_path)])
    measured("t", q2=made).save(tmp_path / "alone.json")
    with pytest.raises(PT2Error, match="no bf16 file"):
        module.main([str(tmp_path / "alone.json"), "-o", str(tmp_path)])


def test_a_file_that_lacks_something_is_refused(tmp_path):
    with pytest.raises(PT2Error, match="lacks something"):
        run({"files": [], "texts": []} | {"files": [{"kind": "pt2"}]}, tmp_path)
