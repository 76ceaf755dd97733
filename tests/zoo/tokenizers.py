"""Two small tokenizers, trained once: SentencePiece-like with byte fallback, and byte-level BPE."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pt2_core.artifact.proof_text import PROSE

VOCAB = 512
UNKNOWN, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL = [UNKNOWN, BOS, EOS, PAD]
# Without these the converter refuses a tokenizer of GLM's or Solar's.
NAMED = ["<|startoftext|>", "<|endoftext|>", "[gMASK]", "<|user|>", "<|observation|>"]
_SPACE = "\u2581"


def sentencepiece(space_first: bool = True) -> dict[str, Any]:
    """A BPE with byte fallback, in the form in which transformers saves Llama's.

    Args:
        space_first: whether a text gets a space in front.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True))
    first = [normalizers.Prepend(_SPACE)] if space_first else []
    made.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*SPECIAL, *bytes_], show_progress=False
    )
    made.train_from_iterator(PROSE.split("\n"), trainer)
    value: dict[str, Any] = json.loads(made.to_str())
    value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] in SPECIAL]
    value["post_processor"] = _bos_first()
    return value


def byte_level() -> dict[str, Any]:
    """A byte-level BPE that cuts as GPT-2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[*SPECIAL, *NAMED], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(PROSE.split("\n"), trainer)
    value: dict[str, Any] = json.loads(made.to_str())
    return value


def _bos_first() -> dict[str, object]:
    from tokenizers.processors import TemplateProcessing

    made = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    value: dict[str, object] = json.loads(made.__getstate__())
    return value


@cache
def train() -> dict[str, str]:
    """Kind -> its tokenizer.json."""
    return {
        "spm": json.dumps(sentencepiece()),
        "gemma": json.dumps(sentencepiece(space_first=False)),
        "bpe": json.dumps(byte_level()),
    }


def write(kind: str, folder: Path) -> None:
    """Write a tokenizer's files into a model's folder."""
    (folder / "tokenizer.json").write_text(train()[kind], encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
              "unk_token": UNKNOWN, "pad_token": PAD}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
