"""Four levels in files: what holds them, what refuses them, and that the file says so."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from export_support import read

from export import ExportConfig, export_gguf
from export.levels import check_levels, levels_entry, levels_of, wrong_levels
from pt2_core import formats
from pt2_core.artifact.folder import Artifact
from pt2_core.errors import PT2Error
from pt2_core.gguf_info import read_gguf

pytestmark = pytest.mark.llama
UP = "model.layers.1.mlp.up_proj"


def test_a_file_of_four_levels_holds_the_artifact_and_says_so(made, tmp_path):
    _, folder = made(levels=4)
    artifact = Artifact.open(folder)
    assert levels_of(artifact) == 4
    report = export_gguf(folder, tmp_path / "m.gguf", ExportConfig(type="tq2_1"))
    tensors, fields = read(tmp_path / "m.gguf")
    assert report.verified and fields["pt2.tq2_1.levels"] == 4
    codes, alpha, mu = formats.TQ2_1.unpack(np.asarray(tensors["blk.1.ffn_up.weight"].data))
    up = artifact.block(1)[UP]
    assert np.unique(codes).tolist() == [0, 1, 2, 3]
    assert sorted(map(bytes, codes)) == sorted(map(bytes, up.codes() + 1))  # rows are folded
    assert np.array_equal(np.sort(alpha[:, 0]), np.sort(up.alpha[:, 0]))
    assert np.array_equal(np.sort(mu[:, 0]), np.sort(up.mu[:, 0]))
    assert read_gguf(tmp_path / "m.gguf").metadata["pt2.tq2_1.levels"] == 4
    assert list(wrong_levels(artifact, fields, tensors.values())) == []
    del fields["pt2.tq2_1.levels"]
    wrong = list(wrong_levels(artifact, fields, tensors.values()))
    assert wrong == ["pt2.tq2_1.levels is missing in place of 4"]


def test_q2_k_takes_four_levels(made, tmp_path):
    _, folder = made(levels=4)
    report = export_gguf(folder, tmp_path / "m.gguf", ExportConfig(type="q2_k"))
    tensors, fields = read(tmp_path / "m.gguf")
    assert report.error is not None and report.error < 0.05
    assert "pt2.tq2_1.levels" not in fields
    data = np.asarray(tensors["blk.1.ffn_up.weight"].data)
    got = gguf.dequantize(data, gguf.GGMLQuantizationType.Q2_K)
    want = Artifact.open(folder).block(1)[UP].dequantize()
    assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(want), rel=0.02)


def test_three_levels_say_nothing_and_a_type_of_three_refuses_four(made):
    three, four = (Artifact.open(made(levels=n)[1]) for n in (3, 4))
    assert all(levels_entry(three, kind) == {} for kind in formats.TYPES)
    assert levels_entry(four, "q2_k") == {}
    check_levels(three, "tq1_1")
    check_levels(four, "q2_k")
    with pytest.raises(PT2Error, match=r"4 levels, tq1_1 holds 3: use --type tq2_1 or q2_k$"):
        check_levels(four, "tq1_1")


def test_export_refuses_before_it_converts(made, tmp_path):
    with pytest.raises(PT2Error, match="4 levels, tq1_1 holds 3"):
        export_gguf(made(levels=4)[1], tmp_path / "m.gguf", ExportConfig(type="tq1_1"))
    assert not any(tmp_path.iterdir())
