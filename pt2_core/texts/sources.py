"""Every text that the project reads, for calibration, refinement and measuring alike.

A source is a text file, JSON lines (also gzipped), a folder of such files, or a named data set;
several are given with commas between them. ``FILE.safetensors[:TENSOR]`` holds token ids instead
(:mod:`pt2_core.texts.tokens`). All tools see the same characters of a source: no byte order mark,
LF line ends, and without the one newline at the very end that llama.cpp's tools drop. Special
tokens that are written in a text are plain text.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pt2_core.errors import PT2Error
from pt2_core.process.temporary import temporary_folder
from pt2_core.texts.bundled import bundled_file, bundled_names
from pt2_core.texts.files import TEXT_SUFFIXES, FileText, normalised, read_file

Purpose = Literal["calibration", "test"]
JOIN = "\n\n"  # between files, records and sources
CHARACTERS_PER_TOKEN = 8  # of a data set's text that is read per token wanted; plenty
# A text of fewer characters is too short to be judged (it is too short for most uses, too).
JUDGED_CHARACTERS = 2048
MIN_LETTERS = 8  # different visible characters of a text; an alphabet alone has 26
# Prose, code and tables pack 2 to 10 times smaller, the same lines over and over 100 times.
MAX_PACKING = 30


@dataclass(frozen=True)
class DataSet:
    """A text of a data set: ``load`` is what :func:`datasets.load_dataset` is called with.

    Attributes:
        rows: the first so many rows only (None: all, or as many as are wanted).
        windows: of 2048 tokens, that the papers score (None: all).
    """

    load: dict[str, Any]
    column: str
    join: str
    rows: int | None = None
    windows: int | None = None


# As GPTQ, PT2-LLM and their rivals calibrate and report.
_WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"}
_PTB = {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank"}
_C4_TRAIN = {"train": "en/c4-train.00000-of-01024.json.gz"}
_C4_TEST = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
DATA_SETS: dict[str, dict[str, DataSet]] = {
    "wikitext2": {
        "calibration": DataSet({**_WIKITEXT, "split": "train"}, "text", "\n\n"),
        "test": DataSet({**_WIKITEXT, "split": "test"}, "text", "\n\n"),
    },
    "c4": {
        "calibration": DataSet(
            {"path": "allenai/c4", "split": "train", "data_files": _C4_TRAIN}, "text", "\n\n"
        ),
        "test": DataSet(
            {"path": "allenai/c4", "split": "validation", "data_files": _C4_TEST},
            "text", " ", rows=1100, windows=256,
        ),
    },
    "ptb": {
        "calibration": DataSet({**_PTB, "split": "train"}, "sentence", " "),
        "test": DataSet({**_PTB, "split": "test"}, "sentence", " "),
    },
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A text as every tool reads it.

    Attributes:
        text: LF line ends, without the newline at its very end.
        name: of the source, without folders.
        field: of JSON records, the field that was read.
        notes: what was done to the source; for the user.
        windows: of 2048 tokens that the papers use of a test set (None: all).
        file: a file that llama.cpp's tools read this very text from, if there is one.
    """

    text: str
    name: str
    field: str | None = None
    notes: tuple[str, ...] = ()
    windows: int | None = None
    file: Path | None = None

    @property
    def label(self) -> str:
        """The name without its endings."""
        return Path(self.name.removesuffix(".gz")).stem

    @property
    def sha256(self) -> str:
        """Of the text with one newline at its end: of most text files as they are."""
        return hashlib.sha256((self.text + "\n").encode()).hexdigest()

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """A file for llama.cpp's ``-f``: the source itself, or a temporary one with the text."""
        if self.file is not None:
            yield self.file
            return
        with temporary_folder(Path(tempfile.gettempdir()), "pt2-text-") as folder:
            path = folder / f"{self.label or 'text'}.txt"
            # llama.cpp drops one newline at the end of the file.
            path.write_bytes((self.text + "\n").encode())
            yield path


def split_sources(sources: str) -> list[str]:
    """``"a.txt,b.txt"`` -> ``["a.txt", "b.txt"]``; a file with a comma in its name stays whole.

    Bundled texts (``bundled:calibration``) become their files.

    Raises:
        PT2Error: there is none, or no bundled text of a name.
    """
    if Path(sources).exists():
        return [sources]
    found = [s for s in (w.strip() for w in sources.split(",")) if s]
    if not found:
        raise PT2Error(f"no text in {sources!r}: {_choices()}")
    return [bundled_file(s) for s in found]


def token_source(source: str) -> tuple[Path, str] | None:
    """``FILE.safetensors[:TENSOR]`` as (file, tensor or ""); None where it is something else."""
    match = re.fullmatch(r"(.+\.safetensors)(?::([^/]*))?", source, re.S)
    if match is None or Path(source).is_dir():
        return None
    return Path(match[1]), match[2] or ""


def check_sources(sources: str, what: str) -> bool:
    """Look whether sources are there, without reading them.

    Args:
        what: they are for, in words.

    Returns:
        whether one of them is text, which needs a tokenizer.

    Raises:
        PT2Error: there is no such source.
    """
    needs = False
    for source in split_sources(sources):
        tokens = token_source(source)
        if tokens is not None:
            if not tokens[0].is_file():
                raise PT2Error(f"no {what} {source!r}: there is no file {tokens[0]}")
            continue
        needs = True
        if not Path(source).exists() and source not in DATA_SETS:
            raise PT2Error(f"no {what} {source!r}: {_choices()}")
    return needs


def source_name(sources: str) -> str:
    """The sources as records hold them: no folders of this machine."""
    names = []
    for source in split_sources(sources):
        file, tensor = token_source(source) or (Path(source), "")
        name = file.resolve().name if file.is_dir() else file.name
        names.append(name + (f":{tensor}" if tensor else ""))
    return ",".join(names)


def read_text(
    sources: str, purpose: Purpose = "calibration", *, text_field: str | None = None,
    enough: int | None = None,
) -> Text:  # fmt: skip
    """The text of a source, or of several with commas between them, joined by empty lines.

    Args:
        purpose: which part of a named data set is meant.
        text_field: of JSON records; see :func:`pt2_core.texts.files.read_file`.
        enough: characters after which a data set need not be read on (None: all of it).

    Raises:
        PT2Error: there is no such source, it is no text, its records lack the field, it is
            degenerate (see :func:`refuse_degenerate`), or ``text_field`` has nothing to read.
    """
    parts = [_read_one(s, purpose, text_field, enough) for s in split_sources(sources)]
    for part in parts:
        refuse_degenerate(part.text, part.name)
    if text_field is not None and not any(p.field for p in parts):
        raise PT2Error(f"--text-field {text_field}: {parts[0].name} has no JSON records")
    if len(parts) == 1:
        return parts[0]
    fields = dict.fromkeys(p.field for p in parts if p.field)
    return Text(
        JOIN.join(p.text for p in parts), ",".join(p.name for p in parts),
        ",".join(fields) or None, tuple(n for p in parts for n in p.notes),
    )  # fmt: skip


def _read_one(source: str, purpose: Purpose, text_field: str | None, enough: int | None) -> Text:
    path = Path(source)
    if token_source(source) is not None:
        raise PT2Error(f"{source} holds token ids, and text is needed here: give a text file")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(TEXT_SUFFIXES) and p.is_file())
        if not files:
            raise PT2Error(f"the folder {path} has no text files ({', '.join(TEXT_SUFFIXES)})")
        found = [read_file(p, text_field) for p in files]
        return _text(found, path.resolve().name, None)
    if path.exists():
        found = [read_file(path, text_field)]
        return _text(found, path.name, path if found[0].as_is and path.is_file() else None)
    if source in DATA_SETS:
        return _data_set(source, purpose, enough)
    kind = "calibration text" if purpose == "calibration" else "text"
    raise PT2Error(f"no {kind} {source!r}: {_choices()}")


def _choices() -> str:
    return (
        "give a text file, JSON lines, a folder of them, FILE.safetensors:TENSOR with token ids, "
        f"or one of {', '.join([*DATA_SETS, *bundled_names()])}"
    )


def _text(found: list[FileText], name: str, file: Path | None) -> Text:
    fields = dict.fromkeys(f.field for f in found if f.field)
    text = JOIN.join(f.text for f in found).removesuffix("\n")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:  # JSON can write half of a character
        raise PT2Error(f"{name} has half of a surrogate pair (character {e.start})") from e
    notes = tuple(n for f in found for n in f.notes)
    return Text(text, name, ",".join(fields) or None, notes, file=file)


def _data_set(name: str, purpose: Purpose, enough: int | None) -> Text:
    hint = "or give a text file instead"
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise PT2Error(f"data set {name} needs: pip install 'pt2-llm[data]'; {hint}") from e
    entry = DATA_SETS[name][purpose]
    parts: list[str] = []
    size = 0
    try:
        rows = load_dataset(**entry.load, streaming=True)
        for number, row in enumerate(rows):
            if number == entry.rows or (enough is not None and size > enough):
                break
            parts.append(row[entry.column])
            size += len(parts[-1])
    except Exception as e:  # offline, gone, or changed: datasets has many exceptions
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise PT2Error(f"data set {name} cannot be loaded ({first}); {hint}") from e
    text = normalised(entry.join.join(parts))[0].removesuffix("\n")
    return Text(text, name, windows=entry.windows)


def refuse_degenerate(text: str, name: str) -> None:
    """Refuse what is no text to learn or measure anything from.

    Blank texts and those of one visible character always; from 2048 characters on also those of
    fewer than 8 different visible characters, and those that zlib packs more than 30 times smaller,
    which are the same passages over and over.

    Raises:
        PT2Error: with what was seen.
    """
    advice = "give a text as the model would read it"
    seen = {c for c in set(text) if unicodedata.category(c)[0] not in "ZC"}
    if len(seen) < 2:
        what = f"but {text.count(min(seen))} times {min(seen)!r}" if seen else "but blanks"
        raise PT2Error(f"{name} has nothing {what}: {advice}")
    if len(text) < JUDGED_CHARACTERS:
        return
    if len(seen) < MIN_LETTERS:
        raise PT2Error(f"{name} has only {len(seen)} different visible characters: {advice}")
    data = text.encode()
    packing = len(data) / len(zlib.compress(data, 1))
    if packing > MAX_PACKING:
        lines = len({line for line in text.split("\n") if line.strip()})
        raise PT2Error(
            f"{name} repeats itself ({lines} different lines, zlib packs it {packing:.0f} times "
            f"smaller): {advice}"
        )
