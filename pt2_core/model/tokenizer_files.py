"""Which files of a model's folder are its tokenizer. Free of torch."""

from __future__ import annotations

import re
from pathlib import Path

from pt2_core.errors import PT2Error
from pt2_core.files import read_json

SENTENCEPIECE = "tokenizer.model"
# Whoever reads the folder takes the vocabulary from one of these.
VOCABULARIES = ("tokenizer.json", SENTENCEPIECE, "tekken.json", "vocab.json")
SMALL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OTHERS = ("merges.txt", "chat_template.jinja", "chat_template.json")
TEMPLATES = "additional_chat_templates"
_TIKTOKEN = re.compile(rb"\s*[A-Za-z0-9+/]+=* \d+\s*(\n|$)")
_LFS = b"version https://git-lfs"


def tokenizer_files(path: Path) -> tuple[list[str], list[str]]:
    """The tokenizer's files, relative to the folder and sorted, and what was left out.

    Raises:
        PT2Error: ``tokenizer.model`` or one of the small JSON files is damaged, or the tokenizer
            asks for Python code of the folder, which is never run.
    """
    notes: list[str] = []
    names = [n for n in (*VOCABULARIES, *SMALL_JSON, *_OTHERS) if (path / n).is_file()]
    names += [f"{TEMPLATES}/{p.name}" for p in (path / TEMPLATES).glob("*.jinja")]
    if SENTENCEPIECE in names and not _sentencepiece(path / SENTENCEPIECE):
        _check_tiktoken(path)
        names.remove(SENTENCEPIECE)
        notes.append(f"ignored {SENTENCEPIECE}: it is tiktoken's; tokenizer.json is used")
    for name in SMALL_JSON:
        if name in names and not isinstance(read_json(path / name), dict):
            raise PT2Error(f"{path / name} does not hold the tokenizer's settings")
    refuse_code(path / "tokenizer_config.json")
    return sorted(names), notes


def refuse_code(file: Path) -> None:
    """Raise PT2Error where a JSON file asks for Python code of the model's folder."""
    value = read_json(file) if file.is_file() else None
    if isinstance(value, dict) and value.get("auto_map"):
        raise PT2Error(
            f"{file} asks for Python code of the model's folder (auto_map), which is never run: if "
            "the model works without it, remove that entry"
        )


def _check_tiktoken(path: Path) -> None:
    with (path / SENTENCEPIECE).open("rb") as f:
        head = f.read(512)
    if head.startswith(_LFS):
        raise PT2Error(f"{path / SENTENCEPIECE} is a Git LFS pointer: run git lfs pull")
    if not _TIKTOKEN.match(head):
        raise PT2Error(f"{path / SENTENCEPIECE} is damaged: copy or download it again")
    if not (path / "tokenizer.json").is_file():
        raise PT2Error(
            f"{path / SENTENCEPIECE} is tiktoken's, which is not read, and there is no "
            "tokenizer.json: copy it from where the model came from"
        )


def _sentencepiece(path: Path) -> bool:
    """Whether a file is a SentencePiece model: a protobuf message whose field 1 are the pieces."""
    data = path.read_bytes()
    at, pieces = 0, 0
    while at < len(data):
        tag, at = _varint(data, at)
        size, at = _varint(data, at)
        # Every field of the message (pieces and the three specs) is a message itself.
        if tag & 7 != 2 or at + size > len(data):
            return False
        pieces += tag >> 3 == 1
        at += size
    return pieces > 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf number and the place behind it; (2**64, end) where the data end within it."""
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    return 1 << 64, len(data)
