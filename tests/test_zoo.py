"""Every causal language model class that transformers and the pinned llama.cpp know: the zoo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pt2_core.artifact.proof import Proof
from pt2_llama import api
from tests.zoo import table
from tests.zoo.classes import causal_classes, registered
from tests.zoo.expected import AT_LEAST, QUICK, REASONS
from tests.zoo.kept import keep, kept

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> dict[str, Any]:
    """Run ``python -m tests.zoo``; its figures. Fails with its words where an outcome is new."""
    out = Path(arguments[-1])
    done = subprocess.run(
        [sys.executable, "-m", "tests.zoo", *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


@pytest.mark.llama
@pytest.mark.quick
def test_a_dozen_classes_go_through_the_whole_path(tmp_path):
    found = run("--quick", "--json", str(tmp_path / "zoo.json"))
    assert [n for n in QUICK if not table.is_green(found[n])] == []


@pytest.mark.llama
@pytest.mark.slow
def test_every_class_comes_out_as_the_committed_list_says(tmp_path):
    found = run("--json", str(tmp_path / "zoo.json"))
    assert table.problems(found) == []
    assert sum(map(table.is_green, found.values())) >= AT_LEAST


@pytest.mark.llama
def test_every_reason_is_of_a_class_that_there_is():
    known = causal_classes(api.source_dir())
    assert {*REASONS, *QUICK} <= set(known) and not {*REASONS} & {*QUICK}
    assert all("\n" not in reason and 10 < len(reason) < 160 for reason in REASONS.values())


@pytest.mark.llama
def test_the_readme_has_a_row_for_every_class():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    part = text[text.index(table.BEGIN) : text.index(table.END)]
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]*)\|", part, re.MULTILINE))
    rows.pop("class")
    known = causal_classes(api.source_dir())
    assert set(rows) == set(known)
    assert {name for name, ternary in rows.items() if not ternary.strip()} == {*REASONS}


def test_classes_are_read_off_the_converters_sources(tmp_path):
    folder = tmp_path / "conversion"
    folder.mkdir()
    (folder / "__init__.py").write_text('TEXT_MODEL_MAP: dict[str, str] = {"A": "a", "B": "a"}')
    (folder / "a.py").write_text(
        '@ModelBase.register("A", "C")\n@ModelBase.example("B")\nclass Made(TextModel): pass\n'
    )
    assert registered(tmp_path) == {"A"}


def test_outcomes_that_are_not_the_expected_ones_are_named(monkeypatch):
    monkeypatch.setattr(table, "REASONS", {"Red": "it has no tokens", "Mended": "no longer"})
    figures = {"ternary": 4, "kept": 0, **{t: {"kl": 0.001, "fallbacks": 0} for t in table.TYPES}}
    found = {"Green": figures, "Mended": figures, "Red": {"error": "x"}, "New": {"error": "broken"}}
    assert table.problems(found) == [
        "Mended is green now: take it out of tests/zoo/expected.py", "New: broken"
    ]  # fmt: skip
    assert "it has no tokens" in table.row("Red", found["Red"])
    assert "0.0010" in table.row("Green", figures)


def test_the_table_takes_the_place_between_its_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.put(readme, {"New": {"error": "broken"}})
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{table.END}\nafter\n")
    assert "| New |" in text and "old" not in text
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table"):
        table.put(readme, {})


def test_files_are_kept_with_what_they_have_to_predict(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    top = np.tile(np.arange(100, dtype=np.int32), (1, 1, 1))
    proof = Proof("text", np.arange(4, dtype=np.int32)[None], None, top,
                  np.full(top.shape, -4.6, np.float32), (("line", "a"),),
                  (np.array([7], np.int32),))  # fmt: skip
    keep(file, proof, {"line": "known"}, tmp_path / "kept", "Class")
    [(name, found, read, gaps)] = kept(tmp_path / "kept")
    assert (name, found.read_bytes(), gaps) == ("Class", b"GGUF", {"line": "known"})
    assert read.top.shape == (1, 1, 64) and read.lines == proof.lines
