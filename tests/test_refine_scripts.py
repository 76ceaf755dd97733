"""benchmarks/refine_schedules.py and refine_cost.py, in small; text of a model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scripts import load_script

from pt2_core.artifact.folder import Artifact
from quantize.refinement.selftext import main as selftext

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/wiki-llama-7m"


def test_schedules_end_in_an_artifact_of_the_best(tmp_path, monkeypatch, capsys):
    script = load_script("refine_schedules")
    steps = {"T frozen": {"codes": "frozen"}, "slow": {"lr_codes": 1e-3}}
    monkeypatch.setattr(script, "STEP_SIZES", steps)
    monkeypatch.setattr(script, "CHANGES", {})
    monkeypatch.setattr(script, "CONTEXT", 64)
    # A clock that stands: what is tried, and how long the long run is, are no matter of speed.
    monkeypatch.setattr(script.Clock, "left", lambda clock: clock.budget)
    planned = []
    monkeypatch.setattr(script, "steps_within", lambda *given: planned.append(given) or 24)
    text = (ROOT / "examples/text/calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:20000], encoding="utf-8")
    (tmp_path / "held.txt").write_text(text[20000:23000], encoding="utf-8")
    options = ["--calibration", str(tmp_path / "train.txt"), "--samples", "4", "--minutes", "1"]
    options += ["--held-out", str(tmp_path / "held.txt"), "--held-windows", "4", "--steps", "2"]
    options += ["--test", str(tmp_path / "held.txt"), "--batch-size", "2", "--micro-batch", "2"]
    options += ["--own-tokens", "128", "--own-rows", "2", "--dtype", "float32", "--device", "cpu"]
    assert script.main([str(MODEL), *options, "--threads", "1", "-o", str(tmp_path / "o")]) == 0
    results = json.loads((tmp_path / "o/schedules.json").read_text())
    assert results["runs"]["T frozen"]["changed"] == 0
    assert results["runs"]["slow"]["steps"] == 2
    assert "held.txt" in results["closed_form"]
    assert (tmp_path / "o/schedules.md").read_text() in capsys.readouterr().out
    assert planned[0][0] == 60 and results["runs"]["long"]["steps"] == 24
    assert results["long"]["held.txt"] < results["closed_form"]["held.txt"]
    assert Artifact.open(tmp_path / "o/final").manifest["settings"]["refine"]["codes"] == "ste"


def test_the_long_run_leaves_time_to_measure():
    script = load_script("refine_schedules")
    seconds = script.TAIL_SECONDS + 100
    assert script.steps_within(seconds, 2.0) == int(200 * script.SPARE) < 200
    assert script.steps_within(script.TAIL_SECONDS / 2, 2.0) < 0


@pytest.mark.parametrize("codes", ["frozen", "ste"])
def test_cost_is_measured_at_a_shape(codes, capsys):
    options = ["--shape", "tiny", "--batch-size", "2", "--micro-batch", "1", "--seqlen", "16"]
    options += ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--codes", codes]
    assert load_script("refine_cost").run_main(options) == 0
    record, line = capsys.readouterr().out.strip().splitlines()
    assert json.loads(record)["tokens_per_step"] == 32
    assert "random weights" in line and "an hour holds" in line


def test_a_model_writes_text_and_repeats_itself(tmp_path):
    from safetensors.torch import load_file

    options = ["--tokens", "60", "--length", "20", "--batch", "2", "--device", "cpu"]
    options += ["--dtype", "float32", "--prompts", str(ROOT / "examples/text/wiki.test.txt")]
    options += ["--prompt-tokens", "5"]
    for name in ("a", "b"):
        assert selftext([str(MODEL), "-o", str(tmp_path / name), *options]) == 0
    a, b = (load_file(tmp_path / name)["train"] for name in ("a", "b"))
    assert a.shape == (3, 20) and torch.equal(a, b)
    assert len({tuple(row.tolist()) for row in a}) == 3
    assert selftext([str(MODEL), "-o", str(tmp_path / "c"), "--length", "1"]) == 2
