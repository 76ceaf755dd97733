"""benchmarks/paper_tables.py: its variants run and are not run twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts import load_script

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    return load_script("paper_tables")


def test_a_table_is_made_once(script, tmp_path, capsys, monkeypatch):
    model = ROOT / "examples/wiki-llama-7m"
    options = [
        "--text",
        str(ROOT / "examples/text/austen.test.txt"),
        "--chunks",
        "1",
        "--ctx",
        "64",
    ]
    options += ["--calibration", str(ROOT / "examples/text/calibration.txt"), "--samples", "2"]
    options += ["--seqlen", "64", "--tasks", "none", "--device", "cpu", "--threads", "1"]
    options += ["--tables", "2b", "-o", str(tmp_path), "--published", "llama-2-7b"]
    assert script.main([str(model), *options]) == 0
    page = capsys.readouterr().out
    assert "| SSR |" in page and "11.56, 24.38, 43.33" in page
    rows = json.loads((tmp_path / "tables.json").read_text())
    assert [r["title"] for r in rows] == ["none", "random", "Hessian", "SSR"]
    assert len({r["perplexity"]["austen.test"] for r in rows}) == 4

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(script, "measure", never)
    assert script.main([str(model), *options]) == 0
    assert capsys.readouterr().out == page


def test_published_rows_are_rows_of_ours(script):
    ours = {(v.table, v.title) for v in script.VARIANTS}
    for model, rows in script.PUBLISHED.items():
        assert set(rows) <= ours, model
