"""Every source of text: what is read, what is refused, and that all tools see the same tokens."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantize_support import tiny_model, token_file
from safetensors.torch import save_file

from llamacpp_bench import load_results
from pt2_core.errors import PT2Error
from pt2_core.texts import sources as texts
from pt2_core.texts.files import read_file
from pt2_core.texts.sources import read_text, source_name, split_sources, token_source
from pt2_core.texts.tokens import (
    bos_token,
    check_context,
    context_limit,
    encode,
    llama_windows,
    load_tokenizer,
    refuse_degenerate_tokens,
    stream,
)
from pt2_llama import api
from quantize import evaluate
from quantize.calibration import load_calibration
from quantize.cli import main as quantize_main
from quantize.config import Config
from quantize.refinement.cli import main as refine_main
from quantize.refinement.config import RefineConfig
from quantize.sensitivities import main as measure_main

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples/wiki-llama-7m"
PROSE = (ROOT / "examples/text/austen.test.txt").read_text(encoding="utf-8")[:6000].rstrip("\n")
BOM = b"\xef\xbb\xbf"

# One text written in several ways -----------------------------------------------------------------

SPECIAL = PROSE.replace(". ", ". <s> </s><|im_end|> <unk> ")
WAYS: dict[str, tuple[bytes, str, bool]] = {  # bytes, what is read, whether llama.cpp gets the file
    "lf": ((PROSE + "\n").encode(), PROSE, True),
    "no final newline": (PROSE.encode(), PROSE, True),
    "three newlines": ((PROSE + "\n\n\n").encode(), PROSE + "\n\n", True),
    "crlf": ((PROSE + "\n").replace("\n", "\r\n").encode(), PROSE, False),
    "cr": (PROSE.replace("\n", "\r").encode(), PROSE, False),
    "mark": (BOM + PROSE.encode(), PROSE, False),
    "mark and crlf": (BOM + PROSE.replace("\n", "\r\n").encode(), PROSE, False),
    "special tokens": (SPECIAL.encode(), SPECIAL, True),
    "nul": (PROSE.replace(". ", ".\0").encode(), PROSE.replace(". ", ".\0"), True),
}


def put(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize("way", WAYS)
def test_a_text_has_the_same_characters_however_its_lines_end(tmp_path, way):
    raw, wanted, as_is = WAYS[way]
    text = read_text(put(tmp_path / "t.txt", raw))
    assert text.text == wanted and (text.file is not None) == as_is
    assert bool(text.notes) == (not as_is)
    with text.as_file() as file:  # llama.cpp drops one newline at the end, and nothing else
        assert file.read_bytes().decode().removesuffix("\n") == wanted
    assert as_is == file.exists()  # a temporary file is gone


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory) -> Path:
    """The example model as llama.cpp's converter writes it."""
    from llamacpp_bench import baselines

    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "cache_dir", lambda: folder)
        return baselines.source_gguf(MODEL, lambda line: None).path


def scored_ids(gguf: Path, file: Path, base: Path) -> tuple[list[int], float]:
    """The token ids that llama-perplexity scores in windows of 512, and its perplexity."""
    build = api.require_build("cpu")
    argv = [build.bin_dir / "llama-perplexity", "-m", gguf, "-f", file, "-c", "512", "-t", "1",
            "--kl-divergence-base", base]  # fmt: skip
    done = subprocess.run(argv, env=build.env(), capture_output=True, text=True, check=True)
    raw = base.read_bytes()
    assert raw[:8] == b"_logits_"
    n_ctx, _, n_chunk = struct.unpack("<iii", raw[8:20])
    final = (done.stdout + done.stderr).partition("Final estimate: PPL = ")[2].split()
    running = done.stdout.rstrip().rstrip(",").rpartition("]")[2]
    value = float(final[0] if final else running)  # its last line is lost at times
    return np.frombuffer(raw[20 : 20 + 4 * n_ctx * n_chunk], "<i4").tolist(), value


@pytest.mark.llama
@pytest.mark.parametrize("way", ["lf", "crlf", "mark", "special tokens", "nul"])
def test_llama_perplexity_scores_the_tokens_that_pt2_eval_scores(gguf_model, tmp_path, way):
    from pt2_eval.measure import perplexity
    from pt2_eval.models import open_model

    text = read_text(put(tmp_path / "t.txt", WAYS[way][0]), "test")
    with text.as_file() as file:
        theirs, value = scored_ids(gguf_model, file, tmp_path / "base")
    tokenizer = load_tokenizer(MODEL)
    bos = bos_token(tokenizer)
    ours = [bos, *encode(tokenizer, text.text)]
    assert theirs == ours[: len(theirs)] and len(ours) // 512 * 512 == len(theirs)
    if way != "crlf":
        return
    model = open_model(MODEL, device="cpu")
    windows = llama_windows(model.encode(text.text), model.bos, 512)
    assert perplexity(model, windows, second_half=True).value == pytest.approx(value, rel=0.01)


def bpe_tokenizer(folder: Path) -> Any:
    """A byte-level BPE tokenizer with added tokens of three kinds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    inside = Tokenizer(models.BPE())
    inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inside.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=inside.pre_tokenizer.alphabet())
    inside.train_from_iterator([PROSE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inside)
    tokenizer.add_tokens([
        AddedToken("<|endoftext|>", special=True, normalized=False),
        AddedToken("<|im_end|>", special=False, normalized=False),
        AddedToken("<think>", special=False, normalized=False),
    ])  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def vocabulary_file(tokenizer: Any, path: Path) -> Path:
    """The tokenizer as a GGUF file, token types as llama.cpp's converter gives them."""
    import gguf

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    control = {"<|endoftext|>", "<|im_end|>"}
    added = {t.content for t in tokenizer.added_tokens_decoder.values()}
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("context_length", 64), ("block_count", 1), ("embedding_length", 32),
                        ("feed_forward_length", 32), ("head_count", 1)):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in control else 4 if t in added else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in raw["model"]["merges"]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.llama
def test_added_tokens_are_what_llama_cpp_takes_them_for(tmp_path):
    """Special ones, and those that only look so, are plain text; others are tokens."""
    (tmp_path / "m").mkdir()
    made = bpe_tokenizer(tmp_path / "m")
    line = "It is <think> a truth<|im_end|> <|endoftext|>universally</s> known.\r\nBut\n\n\n"
    text = read_text(put(tmp_path / "t.txt", BOM + line.encode() + PROSE.encode())).text
    got = encode(load_tokenizer(tmp_path / "m"), text)
    added = {t.content: i for i, t in made.added_tokens_decoder.items()}
    assert added["<think>"] in got
    assert not {added["<|im_end|>"], added["<|endoftext|>"]} & set(got)
    build = api.require_build("cpu")
    vocabulary = vocabulary_file(made, tmp_path / "v.gguf")
    argv = [build.bin_dir / "llama-tokenize", "-m", vocabulary, "-f", put(tmp_path / "n.txt", text),
            "--ids", "--no-bos", "--no-parse-special", "--no-escape"]  # fmt: skip
    done = subprocess.run(argv, env=build.env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.strip().splitlines()[-1]) == got


def test_special_tokens_are_plain_text_for_tokenizers_in_python_too():
    from transformers import AddedToken, GPTSw3Tokenizer

    slow = GPTSw3Tokenizer(vocab_file=str(MODEL / "tokenizer.model"))
    slow.add_tokens([AddedToken("<mid>", special=False), AddedToken("<|x|>", special=False)])
    got = slow.convert_ids_to_tokens(encode(slow, "a <s> hi <mid> there <|x|>"))
    assert got.count("<mid>") == 1 and not {"<s>", "<|x|>"} & set(got)
    assert got.count("<0x3C>") == 2


# JSON records -------------------------------------------------------------------------------------

PARTS = [PROSE[:900], PROSE[900:2000], PROSE[2000:3100]]
READ = "\n\n".join(PARTS)


def lines(*records: Any) -> str:
    return "\n".join(json.dumps(r) for r in records) + "\n"


CHAT = [[{"role": "user", "content": PARTS[0]}, {"role": "assistant", "content": PARTS[1]}],
        [{"role": "user", "content": [{"type": "text", "text": PARTS[2]}]}]]  # fmt: skip
SHAREGPT = [{"conversations": [{"from": "human", "value": p} for p in PARTS]}]


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.jsonl", lines(*({"id": i, "text": p} for i, p in enumerate(PARTS))), "text"),
        ("a.txt", lines(*({"text": p, "meta": {"a": 1}} for p in PARTS)), "text"),
        ("a.raw", "\n\n" + lines(*({"text": p} for p in PARTS)), "text"),
        ("a.jsonl", lines(*({"n": 1, "body": p} for p in PARTS)), "body"),
        ("a.json", json.dumps([{"text": p} for p in PARTS], indent=2), "text"),
        ("a.json", json.dumps(PARTS), "text"),
        ("a.ndjson", lines({"text": READ}), "text"),
        ("a.jsonl", lines(*({"messages": c} for c in CHAT)), "messages"),
        ("a.jsonl", lines(*SHAREGPT), "conversations"),
        ("a.jsonl", lines({"text": None}, {"text": ""}, *({"text": p} for p in PARTS)), "text"),
    ],
)
def test_of_json_records_the_text_is_read(tmp_path, name, content, field):
    for path, raw in (
        (tmp_path / name, content.encode()),
        (tmp_path / f"{name}.gz", gzip.compress(BOM + content.replace("\n", "\r\n").encode())),
    ):
        text = read_text(put(path, raw))
        assert (text.text, text.field) == (READ, field) and text.file is None
        assert f"field {field!r}" in text.notes[0]


def test_the_field_is_the_one_that_is_named(tmp_path):
    source = put(tmp_path / "a.jsonl", lines(*({"text": "no", "body": p} for p in PARTS)))
    assert read_text(source, text_field="body").text == READ
    with pytest.raises(PT2Error, match=r"record 1 has no text in the field 'x'.*'text', 'body'"):
        read_text(source, text_field="x")
    with pytest.raises(PT2Error, match=r"--text-field body: plain\.txt has no JSON records"):
        read_text(put(tmp_path / "plain.txt", PROSE), text_field="body")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines({"a": "x", "b": "y"}), r"fields 'a', 'b': say which.*--text-field NAME"),
        ("config.json", '{"hidden": 1, "layers": 2}', "fields 'hidden', 'layers'"),
        ("a.jsonl", lines({"text": "x"}) + "{broken\n", "line 2 holds no JSON object"),
        ("a.jsonl", lines({"text": "x"}, {"test": "y"}), "record 2 has no text.*'test'"),
        ("a.jsonl", lines({"text": "x"}, {"text": 5}), "record 2 has no text"),
        ("a.jsonl", lines([1, 2]), "line 1 holds no JSON object"),
        ("a.json", "[" * 100_000, "line 1 holds no JSON object"),
        ("a.jsonl", '{"text": "Half a character: \\ud800"}', "surrogate"),
    ],
)
def test_json_without_a_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(PT2Error, match=message):
        read_text(put(tmp_path / name, content))


def test_text_that_only_begins_like_json_is_text(tmp_path):
    for start in ('{"a": 1}\n', "[1] A footnote.\n", "{\\bf Bold} "):
        assert read_text(put(tmp_path / "t.txt", start + PROSE)).text == start + PROSE


# What is no text ----------------------------------------------------------------------------------

HTML = "<div class='x'><p>Some words.</p><br/></div>\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"PAR1" + bytes(50), "a Parquet table, not text"),
        ("t.parquet", b"anything", "a Parquet table"),
        ("t.txt", b"%PDF-1.7\n" + PROSE.encode(), "a PDF document"),
        ("t.txt", b"PK\x03\x04" + bytes(99), "a Zip archive"),
        ("t.txt", b"\x28\xb5\x2f\xfd" + bytes(99), "Zstandard"),
        ("t.txt", PROSE.encode("utf-16"), "UTF-16"),
        ("t.txt", PROSE.encode("utf-16-le"), "binary"),
        ("t.txt", bytes(5000), "binary"),
        ("t.txt", "Größe ".encode("latin-1") * 50, "not UTF-8 text"),
        ("t.txt", b"\x1f\x8b" + bytes(40), "gzip"),
        ("t.gz", gzip.compress(PROSE.encode())[:-9], "not whole gzip"),
        ("t.txt", "<!DOCTYPE html>\n<p>" + PROSE, "HTML or XML"),
        ("t.txt", "<!-- x -->\n<html lang='en'>" + PROSE, "HTML or XML"),
        ("t.txt", "<?xml version='1.0'?>" + PROSE, "HTML or XML"),
        ("t.txt", "".join(HTML.replace("Some", w) for w in PROSE.split()), "HTML or XML"),
        ("t.html", PROSE, "HTML, not text"),
        ("t.csv", "a,b\n" + PROSE, "comma-separated"),
        ("t.txt", b"", "is empty"),
        ("t.txt", " \n\t\u3000" * 2000, "nothing but blanks"),
        ("t.txt", "\ufeff\u200b \n", "nothing but blanks"),
        ("t.txt", "a\n" * 3000, "nothing but 3000 times 'a'"),
        ("t.txt", "".join(random.Random(0).choices("01 \n", k=9000)), "only 2 different visible"),
        ("t.txt", "The quick brown fox jumps.\n" * 400, "1 different lines"),
        ("t.txt", PROSE[:700] * 60, "repeats itself"),
        ("t.jsonl", lines({"text": " "}, {"text": None}), "nothing but blanks"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_refused(tmp_path, name, content, message):
    with pytest.raises(PT2Error, match=message) as caught:
        read_text(put(tmp_path / name, content))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_texts_of_other_scripts_code_and_tables_are_text(tmp_path):
    table = "\n".join(f"| {i} | {i * i} | {i**3 % 97} |" for i in range(400))
    code = Path(texts.__file__).read_text(encoding="utf-8")
    chinese = "".join(chr(random.Random(i).randrange(0x4E00, 0x9000)) for i in range(3000))
    markdown = "<p align='center'><img src='x.png'></p>\n\n# Title\n\n" + PROSE
    for text in (table, code, chinese, markdown, SPECIAL, "<s> </s> " * 3 + PROSE, "short"):
        assert read_text(put(tmp_path / "t.txt", text)).text == text.removesuffix("\n")


def test_token_ids_of_no_real_text_are_refused():
    some = torch.randint(0, 90, (6, 512), generator=torch.Generator().manual_seed(1))
    refuse_degenerate_tokens(some, "t")
    refuse_degenerate_tokens(torch.zeros(4, 100, dtype=torch.int64), "too short to be judged")
    mostly = torch.where(torch.rand(6, 512, generator=torch.Generator().manual_seed(1)) < 0.6, 7,
                         some)  # fmt: skip
    for tokens, message in (
        (torch.zeros_like(some), "only 1 different tokens in 3072"),
        (mostly, r"which 6\d% are the same one \(id 7\)"),
        (some[0, :60].repeat(100), "over and over"),
    ):
        with pytest.raises(PT2Error, match=message):
            refuse_degenerate_tokens(tokens, "t")


# Sources ------------------------------------------------------------------------------------------


def test_sources_are_told_apart(tmp_path):
    comma = put(tmp_path / "a,b.txt", PROSE)
    assert split_sources(comma) == [comma] and split_sources("a, b,") == ["a", "b"]
    assert token_source("d/t.safetensors:train") == (Path("d/t.safetensors"), "train")
    assert token_source("d.safetensors/t.safetensors") == (Path("d.safetensors/t.safetensors"), "")
    assert token_source("t.safetensors.txt") is None and token_source("wikitext2") is None
    assert source_name("/x/t.safetensors:train,/y/a.txt,c4") == "t.safetensors:train,a.txt,c4"
    with pytest.raises(PT2Error, match=r"no text 'gone'.*one of wikitext2, c4, ptb"):
        read_text("gone", "test")
    with pytest.raises(PT2Error, match="holds token ids"):
        read_text("t.safetensors:train")


def test_folders_and_several_sources_are_one_text(tmp_path):
    folder = tmp_path / "d"
    (folder / "sub").mkdir(parents=True)
    put(folder / "b.txt", PARTS[1] + "\r\n")
    put(folder / "a.md", PARTS[0])
    put(folder / "sub/c.jsonl", lines({"text": PARTS[2]}))
    put(folder / "x.bin", b"\0\1")
    text = read_text(str(folder))
    assert text.text == f"{PARTS[0]}\n\n{PARTS[1]}\n\n\n{PARTS[2]}" and text.name == "d"
    both = read_text(f"{folder}/a.md,{folder}/sub/c.jsonl")
    assert both.text == f"{PARTS[0]}\n\n{PARTS[2]}" and both.field == "text"
    assert both.name == "a.md,c.jsonl"


def test_data_sets_have_a_part_for_each_purpose(monkeypatch):
    asked: list[dict[str, Any]] = []

    def load_dataset(**how: Any) -> list[dict[str, str]]:
        asked.append(how)
        return [{"text": p} for p in PARTS * 400]

    monkeypatch.setitem(sys.modules, "datasets", type("M", (), {"load_dataset": load_dataset}))
    assert read_text("wikitext2", enough=2500).text == READ
    monkeypatch.setattr(texts, "refuse_degenerate", lambda *a: None)
    test = read_text("c4", "test")
    assert test.windows == 256 and test.text == " ".join((PARTS * 400)[:1100]).removesuffix("\n")
    assert [a["split"] for a in asked] == ["train", "validation"]


def test_a_mixture_of_texts_and_token_files_is_one_stream(tmp_path):
    save_file({"train": torch.arange(40, dtype=torch.int32)}, tmp_path / "t.safetensors")
    source = put(tmp_path / "a.jsonl", lines({"text": PROSE[:500]}))
    got = stream(f"{tmp_path}/t.safetensors:train,{source}", MODEL, 8192, wanted=100)
    plain = encode(load_tokenizer(MODEL), PROSE[:500])
    assert got.ids.tolist() == [*range(40), *plain] and got.field == "text"


def test_the_manifest_names_the_source_and_its_field(tmp_path):
    source = put(tmp_path / "a.jsonl", lines(*({"body": p} for p in PARTS)))
    how: dict[str, Any] = {
        "samples": 4, "seqlen": 64, "vocab": 8192, "seed": 0, "bos": False,
    }  # fmt: skip
    got = load_calibration(source, MODEL, **how)
    assert (got.record["source"], got.record["field"]) == ("a.jsonl", "body")
    same = load_calibration(put(tmp_path / "b.txt", READ), MODEL, **how)
    assert "field" not in same.record
    assert same.record["tokens_sha256"] == got.record["tokens_sha256"]
    ids = token_file(tmp_path / "t.safetensors")
    with pytest.raises(PT2Error, match=r"--bos: the token ids of t\.safetensors:calibration"):
        load_calibration(ids, MODEL, **{**how, "seqlen": 24, "bos": True})


def test_importing_the_module_loads_no_torch():
    code = (
        "import sys, pt2_core.texts.tokens; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Windows ------------------------------------------------------------------------------------------


def test_windows_beyond_the_context_are_refused_or_allowed_or_of_no_known_limit():
    said: list[str] = []
    how: dict[str, Any] = {"name": "m", "option": "--seqlen", "warn": said.append}
    check_context(64, 64, allow=False, **how)
    assert not said
    with pytest.raises(PT2Error, match=r"at most 64 tokens.*has 65: use --seqlen 64, or --allow"):
        check_context(65, 64, allow=False, **how)
    check_context(65, 64, allow=True, **how)
    check_context(65, None, allow=False, **how)
    assert "65 tokens are longer than the 64" in said[0] and "no limit" in said[1]
    assert context_limit({"max_position_embeddings": 8}) == 8
    assert context_limit({"text_config": {"max_position_embeddings": 8}}) == 8
    assert context_limit({}) is None and context_limit({"max_position_embeddings": None}) is None


@pytest.fixture(scope="module")
def short_model(tmp_path_factory) -> tuple[Path, str]:
    """A model made for 64 tokens, its artifact beside it, and token ids for both."""
    folder = tmp_path_factory.mktemp("short")
    tiny_model(folder / "m")
    text = token_file(folder / "t.safetensors", samples=8, seqlen=80)
    options = ["--calibration", text, "--samples", "2", "--threads", "1", "-q", "--device", "cpu"]
    assert quantize_main([str(folder / "m"), "-o", str(folder / "a"), *options, "--seqlen", "64"])\
        == 0  # fmt: skip
    return folder, text


def test_every_command_refuses_windows_beyond_the_context(short_model, tmp_path, capsys):
    folder, text = short_model
    model, artifact, new = str(folder / "m"), str(folder / "a"), str(tmp_path / "o")
    machine = ["--threads", "1", "--device", "cpu"]
    calls: list[tuple[Any, list[str]]] = [
        (quantize_main, [model, "-o", new, "--calibration", text, "--samples", "2", "--seqlen",
                         "80", "-q", *machine]),
        (measure_main, [artifact, "--calibration", text, "--windows", "2", "--seqlen", "80",
                        *machine]),
        (evaluate.main, [model, "--text", text, "--ctx", "80", *machine]),
        (refine_main, [artifact, "-o", str(tmp_path / "r"), "--text", text, "--seqlen", "80",
                       "--steps", "1", "--batch-size", "1", "--held-out", "1", "--dtype",
                       "float32", *machine]),
    ]  # fmt: skip
    for command, argv in calls:
        assert command(argv) == 2
        said = capsys.readouterr().err
        assert "m takes at most 64 tokens" in said and "--allow-long" in said
        assert command([*argv, "--allow-long"]) == 0
        capsys.readouterr()


def test_what_is_allowed_and_read_is_no_part_of_a_runs_identity():
    for config in (Config(text_field="a", allow_long=True),
                   RefineConfig(text_field="a", allow_long=True)):  # fmt: skip
        assert not {"text_field", "allow_long"} & set(config.identity())


def test_results_of_earlier_versions_have_the_protocols_present_names():
    results = load_results(ROOT / "benchmarks/cpu/82m/results.json")
    assert {p.protocol for m in results.models for p in m.perplexity} == {"llama.cpp", "papers"}


def test_the_final_newline_of_a_gzipped_text_is_dropped(tmp_path):
    file = read_file(Path(put(tmp_path / "t.txt.gz", gzip.compress((PROSE + "\n").encode()))))
    assert file.text == PROSE + "\n" and not file.as_is
    assert read_text(str(tmp_path / "t.txt.gz")).text == PROSE
