"""Files held against the proof: right ones pass, spoiled ones are refused, by name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from export_support import make_artifact, make_model, read

from export import ExportConfig, export_gguf, gguf_types
from export.cli import main
from export.proof import Folder
from export.verify_file import verify_file
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.formats import SMALLEST
from pt2_llama import api

pytestmark = pytest.mark.llama
EXACT = {"embedding_type": "f32", "output_type": "f32"}


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> tuple[Path, Path]:
    """An artifact and a right file made of it; only to be read."""
    folder = tmp_path_factory.mktemp("right")
    model = make_model(folder / "model")
    artifact = make_artifact(folder / "artifact", model)
    report = export_gguf(
        artifact, folder / "m.gguf", ExportConfig(type=SMALLEST.ggml_name, **EXACT)
    )
    assert report.proof is not None and report.proof.problem is None
    return artifact, folder / "m.gguf"


@pytest.fixture
def spoiled(right, tmp_path):
    """Copies the right file and lets a test change its tensors and metadata in place."""

    def make(change) -> Path:
        file = tmp_path / "spoiled.gguf"
        shutil.copy(right[1], file)
        gguf_types.register()
        reader = gguf.GGUFReader(file, "r+")
        change({t.name: t for t in reader.tensors}, reader.fields)
        reader.data.flush()
        return file

    return make


def wrong_fold(tensors, fields):
    """The rows of one v as if its order had not been folded."""
    v = tensors["blk.1.attn_v.weight"].data
    v[:] = v[np.random.default_rng(0).permutation(len(v))]


def wrong_norm(tensors, fields):
    norm = tensors["blk.0.ffn_norm.weight"].data
    norm[:] = norm[::-1].copy()


def wrong_score(tensors, fields):
    """The score of one short piece, so that it is merged before all others."""
    field = fields["tokenizer.ggml.scores"]
    names = fields["tokenizer.ggml.tokens"].contents()
    field.parts[field.data[names.index("nd")]][0] = 1000.0


def wrong_rope(tensors, fields):
    field = fields["llama.rope.freq_base"]
    field.parts[field.data[0]][0] = 500.0


def wrong_alpha(tensors, fields):
    """The sign of alpha in one decoder block's down_proj."""
    blocks = tensors["blk.1.ffn_down.weight"].data.reshape(-1, SMALLEST.nbytes)
    blocks[:, 1] ^= 0x80


def wrong_head(tensors, fields):
    head = tensors["output.weight"].data
    head[:] = np.roll(head, 1, axis=0)


SPOILS = [wrong_fold, wrong_norm, wrong_score, wrong_rope, wrong_alpha, wrong_head]


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_the_proof_refuses_a_file_that_was_spoiled_after_encoding(spoil, right, monkeypatch):
    """At export, with nothing but the proof to see it."""
    from export import pipeline

    write = pipeline.write_gguf

    def write_and_spoil(folder, *args):
        files, digests = write(folder, *args)
        reader = gguf.GGUFReader(files[0], "r+")
        spoil({t.name: t for t in reader.tensors}, reader.fields)
        reader.data.flush()
        return files, digests

    monkeypatch.setattr(pipeline, "write_gguf", write_and_spoil)
    out = right[1].with_name(f"{spoil.__name__}.gguf")
    kept = out.with_name(f"kept-{out.name}")
    config = ExportConfig(type=SMALLEST.ggml_name, verify=False, keep_refused=str(kept), **EXACT)
    with pytest.raises(PT2Error, match=r"not the ternary model's|other tokens of") as e:
        export_gguf(right[0], out, config)
    assert not out.exists() and kept.is_file() and str(kept) in str(e.value)


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda f: f.__name__)
def test_verify_says_what_is_wrong_with_a_spoiled_file(spoil, right, spoiled):
    found = verify_file(spoiled(spoil), right[0], proof_tokens=0)
    assert len(found.problems) == 1
    named = {"wrong_fold": "blk.1.attn_v.weight", "wrong_norm": "blk.0.ffn_norm.weight",
             "wrong_score": "tokenizer.ggml.scores", "wrong_rope": "llama.rope.freq_base",
             "wrong_alpha": "blk.1.ffn_down.weight", "wrong_head": "output.weight"}  # fmt: skip
    assert named[spoil.__name__] in found.problems[0]


def test_verify_sees_one_alpha_of_one_row(right, spoiled):
    """What no prediction shows."""

    def change(tensors, fields):
        tensors["blk.0.attn_q.weight"].data.reshape(-1, SMALLEST.nbytes)[7, 1] ^= 0x80

    found = verify_file(spoiled(change), right[0], proof_tokens=0)
    assert found.problems == [
        "blk.0.attn_q.weight does not hold the artifact's alpha, mu and codes"
    ]


def test_verify_refuses_bytes_that_no_encoder_writes(right, spoiled):
    """Even where they stand for the right values."""

    def change(tensors, fields):
        rows = tensors["blk.0.attn_q.weight"].data
        blocks = rows.reshape(-1, SMALLEST.nbytes)
        block, byte = np.argwhere((blocks[:, 4:28] >= 162) & (blocks[:, 4:28] < 175))[0]
        blocks[block, 4 + byte] += 81
        same = blocks[block : block + 1].copy()
        same[0, 4 + byte] -= 81
        values = SMALLEST.dequantize(blocks[block : block + 1])
        assert np.array_equal(values, SMALLEST.dequantize(same))

    found = verify_file(spoiled(change), right[0], proof_tokens=0)
    assert len(found.problems) == 1
    assert re.fullmatch(
        rf"blk\.0\.attn_q\.weight is damaged: {SMALLEST.name}: row \d+, block \d+ has bytes that "
        "are no codes", found.problems[0],
    )  # fmt: skip


@pytest.mark.parametrize("kind", [*formats.TYPES, "q2_k"])
@pytest.mark.parametrize("tables", [EXACT, {}, {"embedding_type": "q2_k", "output_type": "q2_k"}])
def test_right_files_of_every_type_pass_and_carry_their_figures(kind, tables, right, tmp_path):
    report = export_gguf(right[0], tmp_path / "m.gguf", ExportConfig(type=kind, **tables))
    assert report.proof is not None and report.proof.problem is None
    assert report.proof.difference.kl < 0.01
    fields = read(tmp_path / "m.gguf")[1]
    assert fields["pt2.proof.kl"] == pytest.approx(report.proof.difference.kl, abs=1e-4)
    assert fields["pt2.proof.tokens"] == report.proof.difference.tokens == 1024
    found = verify_file(tmp_path / "m.gguf", right[0])
    assert not found.problems and found.proof is not None and found.tensors > 10


def test_a_file_without_a_proof_says_so(right, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    assert main([str(out), "--from", str(right[0]), "--proof-tokens", "0"]) == 0
    assert "none (--proof-tokens 0)" in capsys.readouterr().out
    fields = read(out)[1]
    assert fields["pt2.proof.tokens"] == 0 and np.isnan(fields["pt2.proof.kl"])
    with pytest.raises(PT2Error, match="--strict: a file without a proof"):
        ExportConfig(strict=True, proof_tokens=0)


def test_the_command_verify_prints_what_it_compared(right, spoiled, capsys):
    command = ["verify", str(right[1]), "--artifact", str(right[0])]
    assert main(command) == 0
    assert "proof     KL 0.000" in capsys.readouterr().out
    command[1] = str(spoiled(wrong_norm))
    assert main([*command, "--proof-tokens", "0"]) == 2
    assert "blk.0.ffn_norm.weight is not the model's" in capsys.readouterr().err


def test_programs_of_any_build_can_judge(right):
    build = api.require_build()
    found = verify_file(right[1], right[0], llama=build.bin_dir)
    assert not found.problems
    with pytest.raises(PT2Error, match="has no program llama-tokenize"):
        Folder(right[0]).tool("llama-tokenize")


def test_a_file_that_llama_cpp_cannot_load_is_refused_in_its_words(right, spoiled):
    def change(tensors, fields):
        field = fields[SMALLEST.layout_key()]
        field.parts[field.data[0]][0] = 7

    with pytest.raises(PT2Error, match=r"cannot use the file: llama-perplexity: .*layout"):
        verify_file(spoiled(change), right[0])
