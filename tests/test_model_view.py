"""The folder that llama.cpp's converter is given: exactly what counts, and never a hurdle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pt2_core.model.card import clean_card, clean_generation
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.model.view import view_folder, write_view
from quantize.calibration import load_tokenizer

WIKI = Path(__file__).parent.parent / "examples" / "wiki-llama-7m"
SINGLE = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(WIKI, tmp_path / "wiki"))


def view(folder: Path, tmp_path: Path, **options) -> tuple[Path, list[str]]:
    checkpoint = Checkpoint.open(folder)
    target = view_folder(checkpoint, tmp_path / "work")
    return target, write_view(checkpoint, target, **options)


def config(folder: Path, **changes) -> None:
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**value, **changes}))


def test_a_view_holds_what_counts_and_nothing_else(folder, tmp_path):
    config(folder, pad_token_id=-1, quantization_config={"bits": 4})
    for name in ("modeling_x.py", "pytorch_model.bin", "model_old.safetensors", "params.json",
                 "vocab.txt", "consolidated.safetensors"):  # fmt: skip
        (folder / name).write_bytes((folder / SINGLE).read_bytes())
    (folder / "chat_template.jinja").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("y")
    target, notes = view(folder, tmp_path)
    assert target.name == folder.name and not notes
    files = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    assert files == sorted(
        ["README.md"] * (WIKI / "README.md").is_file()
        + ["generation_config.json"] * (WIKI / "generation_config.json").is_file()
        + ["config.json", SINGLE, "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
           "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    )  # fmt: skip
    settings = json.loads((target / "config.json").read_text())
    assert settings["pad_token_id"] is None and "quantization_config" not in settings
    assert Checkpoint.open(target).notes == []


def test_shards_get_the_names_and_the_index_that_every_program_reads(folder, tmp_path):
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(tensors)
    for number, part in ((1, names[::2]), (2, names[1::2])):
        save_file({n: tensors[n] for n in part}, folder / f"part-{number}-of-2.safetensors")
    target, _ = view(folder, tmp_path)
    again = Checkpoint.open(target)
    assert again.shards == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == again.home and set(index) == set(names)


def test_tensors_that_do_not_count_are_left_out_where_nobody_else_can(folder, tmp_path):
    tensors = load_file(folder / SINGLE)
    table = tensors["model.embed_tokens.weight"]
    extra = {"v_head.summary.bias": torch.zeros(1), "lm_head.weight": table.clone()}
    save_file({**tensors, **extra}, folder / SINGLE)
    linked, _ = view(folder, tmp_path)
    assert (linked / SINGLE).is_symlink()
    written, _ = view(folder, tmp_path / "second", without_dropped=True)
    found = load_file(written / SINGLE)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[n], tensors[n]) for n in tensors)


def test_the_tokenizer_is_read_from_what_counts(folder):
    config(folder, model_type=None)
    value = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in value.items() if k != "model_type"})
    )
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's: not to be read
    got, want = load_tokenizer(folder), load_tokenizer(WIKI)
    assert got.encode("A few words.") == want.encode("A few words.")


# Model cards --------------------------------------------------------------------------------------


def head(text: str | None) -> dict:
    assert text is not None and text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_every_scalar_of_a_card_stays_the_text_it_was():
    card = (
        "---\nlicense: mit\ntags:\n- 2024\n- 2024-05-01\n- true\n- 1.50\nlanguage: no\n"
        "version: 1.10\nname: 7\nbase_model: a/b\ndatasets:\n- c/d\n- name: e\n  size: 3\n"
        "---\n# T\n"
    )
    text, notes = clean_card(card.encode())
    assert notes == []
    assert head(text) == {
        "license": "mit", "tags": ["2024", "2024-05-01", "true", "1.50"], "language": ["no"],
        "version": "1.10", "name": "7", "base_model": ["a/b"],
        "datasets": ["c/d", {"name": "e", "size": "3"}],
    }  # fmt: skip
    assert text is not None and text.endswith("# T\n")


@pytest.mark.parametrize(
    ("card", "named"),
    [
        (b"---\ntags:\n- a\n- {b: c}\n---\n", "a part of tags"),
        (b"---\nname: [1, 2]\nlicense: [mit]\n---\n", "name"),
        (b"---\nlanguage:\n  a: b\n---\n", "language"),
        (b"---\nbase_model: [[a]]\n---\n", "base_model"),
        (b"---\ntitle: My model: the second\n---\n", "not valid YAML"),
        (b"---\n- just\n- a list\n---\n", "no list of entries"),
        (b"---\na: !!python/object/apply:os.getcwd []\nname: [*x]\n---\n", "YAML"),
        ("---\nlicense: other\n---\n# Modèle\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_bad_values_of_a_card_are_dropped_and_named(card, named):
    _, notes = clean_card(card)
    assert len(notes) == 1 and named in notes[0] and "README.md" in notes[0]


@pytest.mark.parametrize(
    "card", [b"", b"no head", b"---\n---\n", b"---\ntags: []\nname:\nversion: null\n---\n",
             b"\xef\xbb\xbf---\r\nname: x\r\n---\r\n", b"---\nname: x\n"],
)  # fmt: skip
def test_empty_entries_of_a_card_are_no_news(card):
    text, notes = clean_card(card)
    assert text is not None and notes == []


def test_control_characters_cannot_break_out_of_the_head():
    text, _ = clean_card(b'---\nname: "a\\n---\\nb\\u2028c\\x07"\nauthor: x\n---\n')
    assert head(text) == {"name": "a --- b c", "author": "x"}


def test_generation_settings_that_cannot_be_stored_are_dropped_and_named():
    raw = {
        "temperature": 1, "top_k": 20.0, "top_p": "0.9", "min_p": True, "mirostat": 1.5,
        "repetition_penalty": 1e300, "eos_token_id": [1, 2], "xtc_threshold": None,
    }  # fmt: skip
    values, notes = clean_generation(json.dumps(raw).encode())
    assert values == {"temperature": 1.0, "top_k": 20, "eos_token_id": [1, 2]}
    assert [n.split()[1] for n in notes] == ["mirostat", "top_p", "min_p", "repetition_penalty"]
    for broken in (b"{ not json", b"\xff", b"[1]", b'{"a": ' * 100000):
        values, notes = clean_generation(broken)
        assert values is None and len(notes) == 1
