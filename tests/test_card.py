"""The model card: what the hub reads at its head, true figures below, and commands that fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from export_support import make_artifact, make_model
from huggingface_hub import ModelCard, metadata_load

from export import cli
from export.card import Base, card_path, card_text, read_base, write_card
from export.pipeline import ExportReport
from export.proof import Verdict
from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.proof import Difference
from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_core.formats import DEFAULT
from pt2_llama import api

CARD = """\
---
license: other
license_name: tiny-community
license_link: LICENSE
language:
- en
- no
datasets: [acme/text]
tags: [conversational]
---
# The base model's own text
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("card") / "tiny")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def artifact(model: Path) -> Artifact:
    return Artifact.open(make_artifact(model.parent / "artifact", model))


@pytest.fixture
def report(tmp_path: Path) -> ExportReport:
    """What an export of a chat model found."""
    return ExportReport(
        files=[tmp_path / "tiny.gguf"], type=DEFAULT.ggml_name, parameters=2_000_000,
        ternary_parameters=1_500_000, file_bytes=750_000, ternary_bits=3_375_000,
        others=[("token_embd.weight", (256, 320), "Q4_K", "token embeddings")], fallbacks=[],
        verified=True, chat=True,
        proof=Verdict(Difference(0.0031, 0.98, 0.003, 0.003, 500, 1024), 19, {}),
    )  # fmt: skip


def test_the_hub_reads_base_licence_and_language(
    model: Path, artifact: Artifact, report: ExportReport, tmp_path: Path
) -> None:
    path = tmp_path / "README.md"
    write_card(path, report, artifact, read_base(model, "acme/tiny"))
    head = metadata_load(path)
    assert head == {
        "base_model": "acme/tiny",
        "base_model_relation": "quantized",
        "license": "other",
        "license_name": "tiny-community",
        "license_link": "LICENSE",
        "language": ["en", "no"],
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "llama.cpp", "ternary", "pt2-llm"],
    }
    card = ModelCard.load(path)
    assert card.data.base_model == "acme/tiny"
    assert card.text.lstrip().startswith(f"# tiny, ternary ({DEFAULT.name}, GGUF)")
    assert "own text" not in card.text


def test_figures_are_those_of_export_and_artifact(
    model: Path, artifact: Artifact, report: ExportReport
) -> None:
    text = card_text(report, artifact, read_base(model))
    for words in (
        "3.000 of the whole file, 2.250 of its 1,500,000 ternary weights",
        "KL 0.0031 nats per token and 98.0% equal top tokens over 500 positions",
        "read back bit for bit",
        "Licence of the base model: other.",
    ):
        assert words in text
    assert "held-out" not in text and "conversion" not in text and "base_model" not in text
    bare = replace(report, proof=None, verified=False, error=0.0123, type="q2_k")
    changed = card_text(bare, artifact, Base("x", None, {}))
    assert "KL" not in changed and "bit for bit" not in changed
    assert "Q2_K rounds alpha and mu: 1.23% RMS" in changed
    assert "states no licence" in changed and "license" not in changed


def test_a_refined_artifact_tells_its_perplexity(
    model: Path, report: ExportReport, tmp_path: Path
) -> None:
    folder = make_artifact(tmp_path / "refined", model)
    manifest = read_json(folder / "manifest.json")
    held = {"kl": 0.06, "same_top": 0.82, "perplexity": 19.5, "teacher_perplexity": 18.9}
    manifest |= {"refinement": {"before": held | {"kl": 0.2}, "after": held}}
    manifest["settings"] |= {"rounds": 2, "refine": {"steps": 900}}
    write_json(folder / "manifest.json", manifest)
    text = card_text(report, Artifact.open(folder), read_base(model))
    assert "perplexity 19.500, full precision 18.900; KL 0.0600 nats per token" in text
    assert "refined end to end by distillation" in text and "whole rows improved" in text


def test_commands_are_those_of_the_type(
    artifact: Artifact, report: ExportReport, tmp_path: Path
) -> None:
    def commands(report: ExportReport) -> str:
        return card_text(report, artifact, Base("x", None, {})).split("## How to run it")[1]

    assert "pt2-llama run llama-cli -m tiny.gguf\n" in commands(report)
    assert "pt2-llama serve tiny.gguf" in commands(report)
    base = replace(report, chat=False, files=[tmp_path / "my model.gguf"])
    assert "llama-completion -m 'my model.gguf' -no-cnv -p 'The river' -n 64" in commands(base)
    assert "serve" not in commands(base)
    stock = commands(replace(report, type="q2_k"))
    assert "With any llama.cpp" in stock and "pt2-llama" not in stock
    mixed = replace(report, type="q2_k", others=[("blk.0.x", (1,), DEFAULT.name, "")])
    assert "pt2-llama build" in commands(mixed)


def test_a_card_that_is_there_stays(tmp_path: Path, capsys) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(PT2Error, match="is there already: give another with --card FILE"):
        card_path(tmp_path / "x.gguf", "", False)
    assert card_path(tmp_path / "x.gguf", "", True) == tmp_path / "README.md"
    assert card_path(tmp_path / "x.gguf", "card.md", False) == Path("card.md")


def test_a_base_without_a_card_and_one_that_is_broken(tmp_path: Path) -> None:
    assert read_base(tmp_path).entries == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: [\n---\n\xff")
    assert read_base(tmp_path).entries == {}
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    assert read_base(snapshot).hub == "acme/tiny" and read_base(snapshot).name == "tiny"


@pytest.mark.llama
def test_the_option_writes_a_card_beside_the_file(
    model: Path, artifact: Artifact, tmp_path: Path, capsys
) -> None:
    api.require_build()
    out = tmp_path / "tiny.gguf"
    given = [str(out), "--from", str(artifact.path), "--base-model", "acme/tiny"]
    assert cli.main([*given, "--card"]) == 0
    assert f"model card: {tmp_path / 'README.md'}" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "other" and "`tiny.gguf`" in card.text
    out.unlink()
    assert cli.main([*given, "--card"]) == 2
    assert "README.md is there already" in capsys.readouterr().err and not out.exists()
