"""One file's text: unpacked, known to be text, decoded, with one kind of line end.

The rule for every tool: a byte order mark at the beginning is no part of the text, and lines end in
LF (CRLF and a lone CR become LF). Everything else stays as it is.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error

TEXT_SUFFIXES = (".txt", ".raw", ".md", ".text", ".jsonl", ".jsonl.gz", ".ndjson")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
REFUSED_SUFFIXES = {
    ".parquet": "a Parquet table", ".csv": "a table of comma-separated values",
    ".tsv": "a table of tab-separated values", ".html": "HTML", ".htm": "HTML", ".xhtml": "HTML",
    ".xml": "XML", ".pdf": "a PDF document", ".docx": "a Word document", ".rtf": "an RTF document",
}  # fmt: skip
# What files of other kinds begin with.
BEGINNINGS: dict[bytes, str] = {
    b"PAR1": "a Parquet table", b"ARROW1": "an Arrow table", b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document", b"{\\rtf": "an RTF document", b"PK\x03\x04": "a Zip archive",
    b"PK\x05\x06": "a Zip archive", b"GGUF": "a GGUF model", b"\x7fELF": "a program",
    b"SQLite format 3": "an SQLite data base", b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array", b"\x28\xb5\x2f\xfd": "Zstandard data", b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data", b"7z\xbc\xaf": "a 7z archive", b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image", b"\xff\xfe": "UTF-16 text", b"\xfe\xff": "UTF-16 text",
    b"\x80\x02": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle",
}  # fmt: skip
# Control characters that no text has; a few (a stray NUL) may be in a damaged one and stay.
CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
MAX_CONTROL_SHARE = 0.01
MARKUP = re.compile(r"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html[\s>]|\?xml)", re.I | re.S)
TAG = re.compile(
    r"</?(?:html|head|body|div|span|p|a|br|img|table|tr|td|th|ul|ol|li|script|style|meta|link"
    r"|h[1-6])(?:\s[^<>]*)?/?>",
    re.I,
)
MAX_TAG_SHARE = 0.3  # of the characters; a README with some tags in it is text


@dataclass(frozen=True)
class FileText:
    """The text of one file.

    Attributes:
        text: with LF line ends.
        field: of JSON records, the field that was read; None for plain text.
        notes: what was done to it, for the user.
        as_is: the file's bytes are the text's.
    """

    text: str
    field: str | None
    notes: tuple[str, ...]
    as_is: bool


def read_file(path: Path, field: str | None = None) -> FileText:
    """Read a text file, or a text field of JSON lines, either of them possibly gzipped.

    Args:
        field: of JSON records; None takes ``text``, else ``messages`` (a chat: the messages'
            contents one after the other, without roles and template), else the only string field.

    Raises:
        PT2Error: the file cannot be read, is no text in UTF-8, or its records have no such field.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise PT2Error(f"cannot read {path}: {e.strerror}") from e
    if not raw:
        raise PT2Error(f"{path} is empty; give a text of some thousand words")
    data = _unpacked(path, raw)
    _refuse_other_kinds(path, data)
    try:
        decoded = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise PT2Error(f"{path} is not UTF-8 text (byte {e.start}): convert it to UTF-8") from e
    text, notes = normalised(decoded)
    notes = [f"{path.name}: {n}" for n in notes]
    records = _records(path, text, strict=_suffix(path) in JSON_SUFFIXES)
    if records is not None:
        text, used = _field_text(path, records, field)
        notes = [f"{path.name}: JSON records, their field {used!r} is read, {len(records)} times"]
        return FileText(normalised(text)[0], used, tuple(notes), as_is=False)
    _refuse_markup(path, text)
    return FileText(text, None, tuple(notes), as_is=data is raw and text == decoded)


def normalised(text: str) -> tuple[str, list[str]]:
    """The text without a byte order mark and with LF line ends, and words for what was changed."""
    changed = []
    if text.startswith("\ufeff"):
        text = text[1:]
        changed.append("the byte order mark is left out")
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        changed.append("line ends with CR are read as LF")
    return text, changed


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _unpacked(path: Path, raw: bytes) -> bytes:
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as e:
        raise PT2Error(f"{path} is not whole gzip data ({e}): copy it again") from e


def _refuse_other_kinds(path: Path, data: bytes) -> None:
    kind = REFUSED_SUFFIXES.get(_suffix(path))
    kind = kind or next((k for b, k in BEGINNINGS.items() if data.startswith(b)), None)
    if kind is None:
        controls = len(data) - len(data.translate(None, CONTROL))
        if controls > MAX_CONTROL_SHARE * len(data):
            kind = f"binary ({controls} of its {len(data)} bytes are control characters)"
    if kind is not None:
        raise PT2Error(f"{path} is {kind}, not text: give plain text in UTF-8, or JSON lines")


def _refuse_markup(path: Path, text: str) -> None:
    inside = sum(len(m[0]) for m in TAG.finditer(text))
    if MARKUP.match(text[:4096]) or inside > MAX_TAG_SHARE * len(text):
        raise PT2Error(f"{path} is HTML or XML, not plain text: take the text out of it first")


def _records(path: Path, text: str, strict: bool) -> list[Any] | None:
    """The JSON records of a text: one object a line, a list of objects or strings, or one object.

    None where it is no JSON; with ``strict`` (the file's name says that it is) that is refused.
    """
    if not strict and not text.lstrip().startswith(("{", "[")):
        return None
    bad, found = 0, []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        record = _parsed(line)
        if not isinstance(record, dict):
            bad = number
            break
        found.append(record)
    if not bad and found:
        return found
    whole = _parsed(text)
    if isinstance(whole, dict):
        return [whole]
    if isinstance(whole, list) and whole and all(isinstance(r, (dict, str)) for r in whole):
        return [{"text": r} if isinstance(r, str) else r for r in whole]
    if strict:
        raise PT2Error(f"{path} is not JSON lines: line {bad or 1} holds no JSON object")
    return None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _field_text(path: Path, records: list[dict[str, Any]], field: str | None) -> tuple[str, str]:
    """The records' texts, joined by empty lines, and the field they are in."""
    used = field or _usual_field(path, records[0])
    parts = []
    for number, record in enumerate(records, 1):
        value = record.get(used, ...)
        part = "" if value is None else value if isinstance(value, str) else _chat(value)
        if part is None:
            raise PT2Error(
                f"{path}: record {number} has no text in the field {used!r}; its fields are "
                f"{', '.join(map(repr, record)) or 'none'}: name one with --text-field"
            )
        parts.append(part)
    return "\n\n".join(p for p in parts if p), used


def _usual_field(path: Path, record: dict[str, Any]) -> str:
    if isinstance(record.get("text"), (str, type(None))) and "text" in record:
        return "text"
    for name in ("messages", "conversations"):
        if _chat(record.get(name)) is not None:
            return name
    strings = [k for k, v in record.items() if isinstance(v, str)]
    if len(strings) == 1:
        return strings[0]
    raise PT2Error(
        f"{path} has JSON records with the fields {', '.join(map(repr, record)) or 'none'}: say "
        "which one is the text with --text-field NAME"
    )


def _chat(value: Any) -> str | None:
    """The contents of a chat's messages, joined by empty lines; None where it is no chat.

    Roles are left out, and no chat template is applied: its special tokens would be plain text.
    """
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        return None
    parts = []
    for message in value:
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # parts of several kinds; those that are text count
            texts = [p.get("text") for p in content if isinstance(p, dict)]
            content = "\n".join(t for t in texts if isinstance(t, str))
        if content is not None and not isinstance(content, str):
            return None
        parts.append(content or "")
    return "\n\n".join(p for p in parts if p)
