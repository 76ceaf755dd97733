"""pt2-eval: protocols, comparison with a reference, zero-shot tasks on local data, GGUF files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pt2_core.errors import PT2Error
from pt2_core.texts.sources import read_text
from pt2_core.texts.tokens import llama_windows, paper_windows
from pt2_eval.cli import main
from pt2_eval.measure import divergence, perplexity
from pt2_eval.models import TorchModel, open_model
from pt2_eval.table import Row, markdown
from pt2_eval.tasks import continuation_scores, zero_shot
from quantize.config import Config
from quantize.evaluate import perplexity as streamed_perplexity
from quantize.pipeline import ternarize

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = EXAMPLES / "wiki-llama-7m"
TEXT = EXAMPLES / "text/austen.test.txt"


@pytest.fixture(scope="module")
def model() -> TorchModel:
    return TorchModel(MODEL, "cpu", "float32")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "a"
    calibration = str(EXAMPLES / "text/calibration.txt")
    config = Config(calibration=calibration, samples=4, seqlen=64, device="cpu", threads=1)
    ternarize(MODEL, out, config)
    return out


@pytest.fixture(scope="module")
def ids(model) -> list[int]:
    return model.encode(TEXT.read_text(encoding="utf-8")[:6000])


def test_windows_of_both_protocols():
    assert paper_windows([1, 2, 3, 4, 5], 9, 3, None).tolist() == [[9, 1, 2], [3, 4, 5]]
    assert paper_windows([1, 2, 3], None, 8, None).tolist() == [[1, 2, 3]]
    assert llama_windows([1, 2, 3, 4, 5], 9, 3, None).tolist() == [[9, 1, 2], [9, 4, 5]]
    assert llama_windows([1, 2, 3, 4], None, 2, 1).tolist() == [[1, 2]]
    with pytest.raises(PT2Error, match="fewer than one window"):
        llama_windows([1], 9, 3, None)


def test_perplexity_is_that_of_the_streamed_model(model, ids, artifact):
    windows = llama_windows(ids, model.bos, 128, 4)
    for path, folder in ((MODEL, None), (artifact, artifact)):
        got = perplexity(
            open_model(path, device="cpu", source=str(MODEL)), windows, second_half=True, batch=3
        )
        want = streamed_perplexity(
            MODEL, windows, artifact=folder, second_half=True, device="cpu", threads=1
        )
        assert got.value == pytest.approx(want.perplexity, rel=1e-4)
        assert got.tokens == want.tokens == 4 * 63
    everything = perplexity(model, windows, second_half=False)
    assert everything.tokens == 4 * 127


def test_divergence_from_itself_is_nothing_and_from_a_ternary_model_much(model, ids, artifact):
    windows = llama_windows(ids, model.bos, 128, 3)
    none = divergence(model, model, windows)
    assert abs(none.kl) < 1e-6 and none.same_top == 1
    some = divergence(open_model(artifact, device="cpu"), model, windows, batch=2)
    assert some.kl > 0.2 and some.same_top < 0.9
    nll = [
        perplexity(m, windows, second_half=True).value
        for m in (open_model(artifact, device="cpu"), model)
    ]
    # On the model's own text the two would be equal; on another's they are of one size.
    assert 0.2 < some.kl / math.log(nll[0] / nll[1]) < 5


def test_continuations_score_alike_in_batches_and_alone(model, ids):
    pairs = [(ids[:5], ids[5:7]), (ids[:30], ids[30:31]), (ids[:2], ids[2:12])]
    together = continuation_scores(model, pairs, 3)
    for (context, rest), (score, best) in zip(pairs, together, strict=True):
        logits = model.logits(torch.tensor([context + rest]))[0].log_softmax(-1)
        places = range(len(context) - 1, len(context) + len(rest) - 1)
        want = sum(float(logits[p, t]) for p, t in zip(places, rest, strict=True))
        assert score == pytest.approx(want, abs=1e-3)
        assert best == all(int(logits[p].argmax()) == t for p, t in zip(places, rest, strict=True))


def local_task(folder: Path) -> Path:
    """A task whose right answers continue a sentence, the wrong ones are noise."""
    questions = [
        ("The capital of France is", [" Paris", " zxqv"], 0),
        ("He was born in the United", ["bvx", " States"], 1),
        ("It is one of the largest cities in the", [" world", "qqq", "uvu"], 0),
        ("She was awarded the Nobel", ["kk", " Prize"], 1),
    ]
    data = folder / "data.jsonl"
    lines = [json.dumps({"q": q, "choices": c, "gold": g}) for q, c, g in questions]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = folder / "sentences.yaml"
    task.write_text(
        "task: pt2_sentences\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{gold}}"\ndoc_to_choice: "{{choices}}"\n'
        'target_delimiter: ""\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n',
        encoding="utf-8",
    )
    return task


def test_a_local_task_runs_without_a_connection(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    result = zero_shot(model, [str(local_task(tmp_path))])["pt2_sentences"]
    assert result["acc"] >= 0.75 and result["questions"] == 4
    assert zero_shot(model, [str(tmp_path / "sentences.yaml")], limit=2)["pt2_sentences"][
        "questions"
    ] == 2  # fmt: skip
    with pytest.raises(PT2Error, match="no task 'nothing_of_the_kind'"):
        zero_shot(model, ["nothing_of_the_kind"])
    with pytest.raises(PT2Error, match="no task file"):
        zero_shot(model, ["gone.yaml"])


def test_the_command_writes_one_table(artifact, tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text(TEXT.read_text(encoding="utf-8")[:5000], encoding="utf-8")
    options = ["--text", str(short), "--ctx", "256", "--device", "cpu", "-q", "--threads", "1"]
    options += ["--reference", str(MODEL), "-o", str(tmp_path / "out"), "--chunks", "1"]
    assert main([str(MODEL), str(artifact), *options]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "out/eval.md").read_text()
    assert table.count("\n") == 4 and "short: KL" in table
    full, ours = json.loads((tmp_path / "out/eval.json").read_text())
    assert full["divergence"] == {} and ours["divergence"]["short"]["kl"] > 0.1
    assert ours["papers"]["short"]["value"] > full["papers"]["short"]["value"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([str(MODEL)], "nothing to measure"),
        ([str(MODEL), "--text", "gone.txt"], "no text 'gone.txt'"),
        (["gone", "--text", str(TEXT)], "there is no model folder gone"),
        (["gone.gguf", "--text", str(TEXT)], "there is no file gone.gguf"),
        ([str(MODEL), "--text", str(TEXT), "--ctx", "4096"], "at most 2048 tokens"),
        ([str(MODEL), "--text", str(TEXT), "--chunks", "0"], "--chunks and --limit"),
        ([str(MODEL), "--text", f"{TEXT},{TEXT}"], "two of the texts are called austen.test"),
        ([str(MODEL), "--text-field", "a", "--tasks", "paper"], "--text-field belongs to --text"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main([*arguments, "--device", "cpu", "-q"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_the_average_is_over_the_tasks():
    row = Row("m", "hf", 10, tasks={"a": {"acc": 0.5}, "b": {"acc": 0.7}, "c": {"f1": 1.0}})
    assert row.average() == pytest.approx(0.6)
    assert "| m | 0.00 | 50.00 | 70.00 | 60.00 |" in markdown([row])


def test_texts_have_their_names():
    text = read_text(str(TEXT), "test")
    assert text.label == "austen.test" and text.windows is None
    assert "universally acknowledged" in text.text


@pytest.mark.llama
def test_a_gguf_file_measures_as_its_artifact(artifact, ids, tmp_path):
    from export import ExportConfig, export_gguf

    file = tmp_path / "m.gguf"
    export_gguf(artifact, file, ExportConfig(embedding_type="f32", output_type="f32"))
    torch_model = open_model(artifact, device="cpu")
    gguf_model = open_model(file, context=128, threads=1, gpu_layers=0)
    assert gguf_model.bos == torch_model.bos and gguf_model.vocab == torch_model.vocab
    text = TEXT.read_text(encoding="utf-8")[:500]
    assert gguf_model.encode(text) == torch_model.encode(text)
    windows = llama_windows(ids, torch_model.bos, 128, 2)
    close = divergence(gguf_model, torch_model, windows)
    assert close.kl < 0.003 and close.same_top > 0.95


@pytest.mark.llama
def test_refined_norms_and_embeddings_reach_the_file(artifact, ids, tmp_path):
    from export import ExportConfig, export_gguf
    from quantize.refinement.config import RefineConfig
    from quantize.refinement.loop import refine

    config = RefineConfig(
        steps=8, batch_size=4, seqlen=64, held_out=2, eval_every=1, embeddings=True, lr=0.01,
        text=str(TEXT), device="cpu", dtype="float32", threads=1,
    )  # fmt: skip
    refine(artifact, tmp_path / "r", config)
    file = tmp_path / "m.gguf"
    export_gguf(tmp_path / "r", file, ExportConfig(embedding_type="f32", output_type="f32"))
    gguf_model = open_model(file, context=128, threads=1, gpu_layers=0)
    windows = llama_windows(ids, gguf_model.bos, 128, 2)
    refined = open_model(tmp_path / "r", device="cpu")
    assert divergence(gguf_model, refined, windows).kl < 0.003
    assert divergence(gguf_model, open_model(artifact, device="cpu"), windows).kl > 0.01
