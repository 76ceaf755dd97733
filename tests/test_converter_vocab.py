"""Tokenizers as llama.cpp gets them: scores from merges, padding, ids, pre-tokenizers, BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from export_support import TEXT, make_model
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing

from export.converter import Options, try_converter
from export.converter_vocab import (
    BYTE,
    CONTROL,
    GPT2,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    around,
    by_structure,
    family,
    merge_scores,
    spm_tokens,
)
from export.settings import Unsupported
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_llama import api

WORDS = (TEXT + "été naïve x=1; for(i) { a_b += 10 }\nnew  line 你好 ") * 3


def sentencepiece_like(size: int = 420, special: tuple[str, ...] = ("<unk>", "<s>", "</s>")):
    """A BPE with byte fallback, as transformers saves a Llama tokenizer."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    made.train_from_iterator(
        WORDS.split("\n"),
        trainers.BpeTrainer(vocab_size=size, special_tokens=[*special, *bytes_],
                            show_progress=False),
    )  # fmt: skip
    value = json.loads(made.to_str())
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] in special]
    made = Tokenizer.from_str(json.dumps(value))
    made.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def byte_level(regexes: list[str] | None = None, size: int = 400) -> Tokenizer:
    made = Tokenizer(models.BPE())
    cut: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regexes is None)
    if regexes is not None:
        from tokenizers import Regex

        parts = [pre_tokenizers.Split(Regex(r), "isolated") for r in regexes]
        cut = pre_tokenizers.Sequence([*parts, cut])
    made.pre_tokenizer, made.decoder = cut, decoders.ByteLevel()
    made.train_from_iterator(
        WORDS.split("\n"),
        trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                            show_progress=False),
    )  # fmt: skip
    return made


def with_tokenizer(folder: Path, tokenizer: Tokenizer, rows: int = 0, **settings: Any) -> Path:
    """A small model with a tokenizer.json only; ``rows`` of embeddings if not as many as tokens."""
    rows = rows or tokenizer.get_vocab_size()
    make_model(folder, vocab_size=rows)
    for old in folder.glob("tokenizer*"):
        old.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    value = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**value, **settings}))
    return folder


def notes(folder: Path, **options: Any) -> str:
    """What the preflight's process says; whatever it refuses is raised."""
    return "; ".join(
        try_converter(api.source_dir(), Checkpoint.open(folder), {}, Options(**options))
    )


def test_scores_from_merges_make_llama_cpp_merge_as_the_tokenizer_does():
    made = sentencepiece_like()
    value = json.loads(made.to_str())
    scores = merge_scores(value["model"]["merges"])
    ids = value["model"]["vocab"]
    by_id = [0.0] * len(ids)
    for text, score in scores.items():
        by_id[ids[text]] = score
    bytes_ = {i: ids[f"<0x{i:02X}>"] for i in range(256)}
    for text in (WORDS, "quick brown été", "unseen Ж text\tand\nlines", "a  b   c"):
        wanted = made.encode(text, add_special_tokens=False).ids
        assert spm_tokens(" " + text, ids, by_id, bytes_) == wanted
    wrong = spm_tokens(" " + WORDS, ids, [-s for s in by_id], bytes_)
    assert wrong != made.encode(WORDS, add_special_tokens=False).ids


def test_pre_tokenizers_are_recognised_by_their_regular_expressions():
    for (regexes, ignore), name in PRE_TOKENIZERS.items():
        value = json.loads(byte_level(list(regexes)).to_str())
        value["model"]["ignore_merges"] = ignore
        assert by_structure(value) == name
    assert by_structure(json.loads(byte_level().to_str())) == "gpt-2"
    other = json.loads(byte_level([GPT2, r"\p{N}{1,2}"]).to_str())
    assert by_structure(other) is None and family(other) == "byte-level"
    other["normalizer"] = {"type": "Lowercase"}
    other["pre_tokenizer"] = json.loads(byte_level().to_str())["pre_tokenizer"]
    assert by_structure(other) is None


def test_kinds_of_tokenizer_that_llama_cpp_does_not_have_are_refused():
    assert family(json.loads(sentencepiece_like().to_str())) == "bpe"
    with pytest.raises(Unsupported, match="WordLevel"):
        family({"model": {"type": "WordLevel", "vocab": {}}})


def test_what_a_tokenizer_puts_around_a_text_is_seen():
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like())
    assert around(made) == ([1], [])
    made._tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A $B", special_tokens=[("</s>", 2)]
    )
    assert around(made) == ([], [2])


@pytest.mark.llama
def test_a_sentencepiece_like_vocabulary_is_padded_and_said(tmp_path):
    made = sentencepiece_like()
    folder = with_tokenizer(tmp_path / "m", made, rows=made.get_vocab_size() + 7)
    said = notes(folder)
    assert "padded with 7 unused tokens" in said and "merges of tokenizer.json" in said


@pytest.mark.llama
def test_tokens_without_embeddings_are_refused_with_numbers(tmp_path):
    made = sentencepiece_like()
    size = made.get_vocab_size()
    made.add_special_tokens([AddedToken("<|extra|>", special=True)])
    folder = with_tokenizer(tmp_path / "m", made, rows=size)
    with pytest.raises(PT2Error, match=rf"1 tokens from {size} \('<\|extra\|>'\).*{size} rows"):
        notes(folder)


@pytest.mark.llama
def test_an_unknown_pre_tokenizer_is_refused_with_a_way_out(tmp_path):
    folder = with_tokenizer(tmp_path / "m", byte_level([GPT2, r"\p{N}{1,2}"]))
    with pytest.raises(PT2Error, match=r"--pre-tokenizer NAME, one of .*gpt-2.*qwen2"):
        notes(folder)
    assert "pre-tokenizer qwen2 (--pre-tokenizer)" in notes(folder, pre_tokenizer="qwen2")
    with pytest.raises(PT2Error, match="--pre-tokenizer 'nonsense'"):
        notes(folder, pre_tokenizer="nonsense")


@pytest.mark.llama
def test_the_written_file_holds_types_scores_and_bos_as_transformers_has_them(tmp_path):
    import gguf

    from export.converter import convert_whole

    made = sentencepiece_like()
    made.add_tokens([AddedToken("jade▁soup", special=False)])
    folder = with_tokenizer(tmp_path / "m", made, extra_special_tokens=["<s>", "</s>"],
                            tokenizer_class=None, add_bos_token=False)  # fmt: skip
    convert_whole(api.source_dir(), Checkpoint.open(folder), tmp_path / "m.gguf", Options())
    f = {k: v.contents() for k, v in gguf.GGUFReader(tmp_path / "m.gguf").fields.items()}
    tokens, types = f["tokenizer.ggml.tokens"], f["tokenizer.ggml.token_type"]
    assert f["tokenizer.ggml.model"] == "llama" and len(tokens) == made.get_vocab_size()
    assert types[1] == CONTROL and types[tokens.index("<0x41>")] == BYTE
    merged = ["".join(m) for m in json.loads(made.to_str())["model"]["merges"]]
    scores = [f["tokenizer.ggml.scores"][tokens.index(text)] for text in merged]
    assert scores == sorted(scores, reverse=True) and scores[-1] == 1 - len(merged)
    assert types[tokens.index(merged[0])] == NORMAL and tokens[-1] == "jade soup"
    # What is written is what the tokenizer does, whatever tokenizer_config.json says of it.
    assert f["tokenizer.ggml.add_bos_token"] is True and f["tokenizer.ggml.bos_token_id"] == 1
    assert f["tokenizer.ggml.add_eos_token"] is False and f["tokenizer.ggml.add_space_prefix"]


@pytest.mark.llama
def test_classes_that_only_ask_for_the_pre_tokenizer_get_ours(tmp_path, monkeypatch):
    """Exaone's converter, for one, writes the vocabulary itself and asks only for that name."""
    from export import converter_vocab

    class Asks:
        """Of the converter's model, what asks."""

        def __init__(self, folder: Path) -> None:
            self.dir_model, self.hparams, self.pre = folder, {}, ""

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            raise NotImplementedError

        def set_vocab(self) -> None:
            self.pre = self.get_vocab_base_pre(None)

    monkeypatch.setattr(converter_vocab, "_settle", lambda *_: None)
    job = {"source": str(api.source_dir()), "shown": "m"}
    known = Asks(with_tokenizer(tmp_path / "known", byte_level()))
    converter_vocab.install(known, job, said := [])
    known.set_vocab()
    assert known.pre == "gpt-2" and len(said) == 1
    unknown = Asks(with_tokenizer(tmp_path / "unknown", byte_level([GPT2, r"\p{N}{1,2}"])))
    converter_vocab.install(unknown, job, [])
    with pytest.raises(Unsupported, match="does not know the pre-tokenizer"):
        unknown.set_vocab()
