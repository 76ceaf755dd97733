"""benchmarks/refine_schedules.py and refine_cost.py, in small; text of a model's own."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from pt2_core.artifact.folder import Artifact
from quantize.refinement.selftext import main as selftext

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/wiki-llama-7m"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_schedules_end_in_an_artifact_of_the_best(tmp_path, monkeypatch, capsys):
    script = load("refine_schedules")
    steps = {"T frozen": {"codes": "frozen"}, "slow": {"lr_codes": 1e-3}}
    monkeypatch.setattr(script, "STEP_SIZES", steps)
    monkeypatch.setattr(script, "CHANGES", {})
    monkeypatch.setattr(script, "CONTEXT", 64)
    monkeypatch.setattr(script, "TAIL_SECONDS", 0)
    text = (ROOT / "examples/text/calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[:20000], encoding="utf-8")
    (tmp_path / "held.txt").write_text(text[20000:23000], encoding="utf-8")
    options = ["--calibration", str(tmp_path / "train.txt"), "--samples", "4", "--minutes", "0.7"]
    options += ["--held-out", str(tmp_path / "held.txt"), "--held-windows", "4", "--steps", "2"]
    options += ["--test", str(tmp_path / "held.txt"), "--batch-size", "2", "--micro-batch", "2"]
    options += ["--own-tokens", "128", "--own-rows", "2", "--dtype", "float32", "--device", "cpu"]
    assert script.main([str(MODEL), *options, "--threads", "1", "-o", str(tmp_path / "o")]) == 0
    results = json.loads((tmp_path / "o/schedules.json").read_text())
    assert results["runs"]["T frozen"]["changed"] == 0
    assert results["runs"]["slow"]["steps"] == 2
    assert "held.txt" in results["closed_form"]
    assert (tmp_path / "o/schedules.md").read_text() in capsys.readouterr().out
    if "long" in results:  # a slow machine may have no time left for it
        assert results["long"]["held.txt"] < results["closed_form"]["held.txt"]
        assert Artifact.open(tmp_path / "o/final").manifest["settings"]["refine"]["codes"] == "ste"


@pytest.mark.parametrize("codes", ["frozen", "ste"])
def test_cost_is_measured_at_a_shape(codes, capsys):
    options = ["--shape", "tiny", "--batch-size", "2", "--micro-batch", "1", "--seqlen", "16"]
    options += ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--codes", codes]
    assert load("refine_cost").run_main(options) == 0
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
