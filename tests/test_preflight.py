"""pt2-quantize tries the export before it reads a weight."""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import pytest
from export_support import make_model, read

from export.cli import main as export_main
from pt2_core.artifact.folder import read_manifest
from pt2_core.artifact.proof_text import PROSE
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api
from quantize.cli import main


def options(model: Path, out: Path, *more: str) -> list[str]:
    text = out.parent / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(PROSE.split(), k=600)))
    return [str(model), "-o", str(out), "--calibration", str(text), "--samples", "2", "--seqlen",
            "16", "--threads", "1", "--device", "cpu", "-q", *more]  # fmt: skip


@pytest.fixture
def no_weight_is_read(monkeypatch):
    def read(self, name, shape=None):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", read)


@pytest.mark.llama
def test_a_setting_that_llama_cpp_does_not_have_is_refused_before_a_weight_is_read(
    tmp_path, capsys, no_weight_is_read
):
    model = make_model(tmp_path / "m", "mistral", sliding_window=64)
    capsys.readouterr()
    assert main(options(model, tmp_path / "a")) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"pt2-quantize: error: {model}/config.json: sliding_window is 64")
    assert error.endswith("--max-context 64") and "\n" not in error
    assert not (tmp_path / "a").exists()


@pytest.mark.llama
def test_max_context_is_kept_and_written_into_the_file(tmp_path):
    model = make_model(tmp_path / "m", "mistral", sliding_window=64)
    out = tmp_path / "a"
    assert main(options(model, out, "--max-context", "48")) == 0
    assert read_manifest(out)["settings"]["max_context"] == 48
    said = json.loads((out / "run.json").read_text())["preflight"]
    assert any("right up to 48 tokens" in note for note in said)
    assert export_main([str(tmp_path / "m.gguf"), "--from", str(out)]) == 0
    _, fields = read(tmp_path / "m.gguf")
    assert fields["llama.context_length"] == fields["pt2.max_context"] == 48


def test_a_preflight_that_was_left_out_is_recorded(tmp_path, monkeypatch):
    def not_to_be_had():
        raise AssertionError("was asked for")

    monkeypatch.setattr(api, "source_dir", not_to_be_had)
    model = make_model(tmp_path / "m", "mistral", sliding_window=64)
    assert main(options(model, tmp_path / "a", "--no-preflight")) == 0
    said = json.loads((tmp_path / "a/run.json").read_text())["preflight"]
    assert said == ["the preflight was left out (--no-preflight)"]


def test_without_the_source_the_preflight_is_left_out_by_name(tmp_path, monkeypatch):
    from pt2_core.errors import PT2Error

    def not_to_be_had():
        raise PT2Error("no network")

    monkeypatch.setattr(api, "source_dir", not_to_be_had)
    model = make_model(tmp_path / "m")
    assert main(options(model, tmp_path / "a")) == 0
    said = json.loads((tmp_path / "a/run.json").read_text())["preflight"]
    assert len(said) == 1 and "preflight was left out" in said[0] and "no network" in said[0]


@pytest.mark.llama
def test_a_yarn_factor_is_written_where_llama_cpp_reads_it(tmp_path):
    from export.converter import Options, convert_whole

    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128,
            "rope_theta": 10000.0, "attention_factor": 1.5}  # fmt: skip
    model = make_model(tmp_path / "m", "qwen3", rope_parameters=rope)
    convert_whole(api.source_dir(), Checkpoint.open(model), tmp_path / "m.gguf", Options())
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    # 1 + 0.1 ln 4 is what llama.cpp multiplies with by itself.
    assert fields["qwen3.rope.scaling.attn_factor"].contents() == pytest.approx(1.5 / 1.1386294)
