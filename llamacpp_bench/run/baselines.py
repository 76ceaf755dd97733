"""Baselines: other quantisations of the same model, made by llama.cpp's own tools, and cached.

HF folder --llama.cpp's converter--> BF16 GGUF --llama-quantize--> Q2_K, IQ1_M, ...
                                     calibration text --llama-imatrix--> importance matrix
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamacpp_bench.run.process import run_tool
from llamacpp_bench.run.tools import ToolBox, cache_dir
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path, read_json
from pt2_core.gguf_info import GGUFInfo, read_gguf
from pt2_core.texts.sources import CHARACTERS_PER_TOKEN, Text

# The names llama-quantize takes (tools/quantize/quantize.cpp), upper case.
QUANTIZE_TYPES = (
    *("F32", "F16", "BF16", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q2_K_S", "Q3_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K", "Q4_K_S", "Q4_K_M"),
    *("Q5_K", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE"),
)
# Types that llama-quantize refuses to make without an importance matrix (src/llama-quant.cpp).
NEEDS_IMATRIX = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "Q2_K_S")
FLOAT_TYPES = ("F32", "F16", "BF16")
IMATRIX_CHUNKS = 200
IMATRIX_WINDOW = 512  # tokens; llama-imatrix's own default
IMATRIX_ENOUGH = IMATRIX_CHUNKS * IMATRIX_WINDOW * CHARACTERS_PER_TOKEN
CONVERSION = b"view 2"  # part of the cache's keys: another value where folders convert otherwise
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """One baseline: a `type` of llama-quantize, or a `file` that exists."""

    type: str | None = None
    file: Path | None = None

    @property
    def label(self) -> str:
        return self.type or (self.file.stem if self.file else "?")


def parse_baselines(text: str) -> list[Wanted]:
    """`"q2_k,iq1_m,other.gguf"` -> what is wanted, in order; `"none"` -> nothing.

    Raises:
        PT2Error: a word is neither a type llama-quantize knows nor a .gguf file.
    """
    wanted = []
    for word in filter(None, (w.strip() for w in text.split(","))):
        if word.lower() == "none":
            continue
        if word.endswith(".gguf"):
            wanted.append(Wanted(file=Path(word)))
        elif word.upper() in QUANTIZE_TYPES:
            wanted.append(Wanted(type=word.upper()))
        else:
            known = ", ".join(QUANTIZE_TYPES)
            raise PT2Error(f"unknown baseline {word!r}: a .gguf file, none, or one of {known}")
    return wanted


def find_source(models: list[GGUFInfo], given: str | Path | None) -> Path:
    """The full-precision model: what was given, else the one that the models were made from.

    Raises:
        PT2Error: none is given or found, or it is not there.
    """
    if given is not None:
        path = Path(given).absolute()  # a relative one may look like an option
        if not path.exists():
            raise PT2Error(f"{path}: no such GGUF file or Hugging Face folder; mend --source")
        return path
    for info in models:
        if (folder := source_by_fingerprint(info)) is not None:
            return folder
    names = ", ".join(i.path.name for i in models)
    raise PT2Error(
        f"no full-precision source for the baselines of {names}: give --source (an F16/BF16 GGUF "
        "or the Hugging Face folder), --baseline other.gguf, or --baseline none"
    )


def source_by_fingerprint(info: GGUFInfo) -> Path | None:
    """The model folder named by an artifact with this file's fingerprint, in the current folder or
    beside the file (docs/design.md: `manifest.json` has the fingerprint, `run.json` the folder)."""
    wanted = info.metadata.get("pt2.model_fingerprint")
    if not isinstance(wanted, str):
        return None
    for parent in dict.fromkeys((Path.cwd(), info.path.resolve().parent)):
        for manifest in sorted(parent.glob("*/manifest.json")):
            try:
                found = read_json(manifest)["model"]["fingerprint"]
                folder = read_json(manifest.with_name("run.json"))["model_dir"]
            except (PT2Error, KeyError, TypeError):
                continue  # somebody else's file, or a damaged one: not the one that is looked for
            there = isinstance(folder, str) and os.path.isfile(os.path.join(folder, "config.json"))
            if found == wanted and there:
                return Path(folder)
    return None


def source_gguf(source: Path, say: Say, models: Sequence[GGUFInfo] = ()) -> GGUFInfo:
    """The source as a GGUF file: itself, or converted once by llama.cpp's converter and cached.

    Args:
        models: the files that it is the source of.

    Raises:
        PT2Error: neither a float GGUF nor a model folder, or the conversion failed.
    """
    if source.is_file():
        info = read_gguf(source)
        if info.main_type() not in FLOAT_TYPES:
            raise PT2Error(
                f"{source} is {info.main_type()}, not F16, BF16 or F32; quantising it again would "
                "make a baseline worse than it is: give the full-precision file"
            )
        return info
    if not (source / "config.json").is_file():
        raise PT2Error(f"{source} has no config.json; give a Hugging Face model folder or a GGUF")
    given = _given(models)
    key = "-".join([folder_key(source), *map(str, given.values())])
    final = cache_dir() / cache_name(f"{source.resolve().name}-{key}-bf16.gguf")
    if not final.is_file():
        say(f"converting {source.name} to BF16")
        _convert(source, final, say, **given)
    return read_gguf(final)


def cache_name(name: str) -> str:
    """A name without what the tools take for something else: commas, braces, leading dashes.

    >>> cache_name("a,b {v}")
    'a_b _v_'
    """
    plain = re.sub(r"[,{}\[\]%]", "_", name.encode("utf-8", "replace").decode())
    return re.sub(r"^[-.]", "_", plain)


def check_name(path: Path) -> Path:
    """The absolute path of a file for llama-bench, which takes a comma for the end of a name.

    Raises:
        PT2Error: there is one in it.
    """
    path = path.absolute()
    if "," in str(path):
        raise PT2Error(
            f"{path}: llama-bench takes a comma for the end of a file's name: rename it, or make a "
            "link without one"
        )
    return path


def folder_key(folder: Path) -> str:
    """A key of a model folder: names, sizes and times of the files that the converter reads."""
    digest = hashlib.sha256(CONVERSION)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".bin", ".txt"):
            stat = path.stat()
            digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:12]


def _convert(source: Path, final: Path, say: Say, **given: Any) -> None:
    """Convert what counts of a folder as the exporter does: same repairs, none of its code run.

    Args:
        given: what the files to compare with were given for the tokenizer and the context.
    """
    from export.converter import Options, convert_whole
    from pt2_core.model.checkpoint import Checkpoint
    from pt2_core.model.expected import load_config, settle
    from pt2_llama.api import source_dir

    checkpoint = Checkpoint.open(source)
    settle(checkpoint, load_config(checkpoint))
    with atomic_path(final) as tmp:
        notes = convert_whole(
            source_dir(), checkpoint, tmp, Options(**given), final.with_suffix(".log")
        )
    for note in [*checkpoint.notes, *notes]:
        say(f"warning: {note}")


def _given(models: Sequence[GGUFInfo]) -> dict[str, Any]:
    """``max_context`` and ``pre_tokenizer`` of the first file that has them."""
    given: dict[str, Any] = {}
    for name in ("max_context", "pre_tokenizer"):
        for model in models:
            if f"pt2.{name}" in model.metadata:
                given.setdefault(name, model.metadata[f"pt2.{name}"])
    return given


def same_model(a: GGUFInfo, b: GGUFInfo) -> None:
    """Check that a source and a model have the same shape.

    Raises:
        PT2Error: they differ; both values are named.
    """
    for key in ("block_count", "embedding_length", "feed_forward_length", "attention.head_count"):
        x, y = a.hparam(key), b.hparam(key)
        if x != y:
            raise PT2Error(
                f"{b.path} is not the source of {a.path}: {key} is {y}, the model has {x}; "
                "give the right --source"
            )


@dataclass
class BaselineMaker:
    """Makes the quantised files of one source; `imatrix_text` is the calibration text, if any."""

    tools: ToolBox
    source: GGUFInfo
    imatrix_text: Text | None
    threads: int
    say: Say

    def __post_init__(self) -> None:
        self._source_key = self._key(self.source.path)
        self._imatrix: Path | None = None

    @staticmethod
    def _key(path: Path) -> str:
        stat = path.stat()
        return hashlib.sha256(
            f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()
        ).hexdigest()[:12]

    def make(self, kind: str) -> Path:
        """The file of type `kind`, made or from the cache.

        Raises:
            PT2Error: the type needs an importance matrix and no calibration text was given, or a
                tool failed.
        """
        if kind in FLOAT_TYPES and self.source.main_type() == kind:
            return self.source.path
        imatrix = None if kind in FLOAT_TYPES else self.imatrix()
        if imatrix is None and kind in NEEDS_IMATRIX:
            raise PT2Error(
                f"{kind} needs an importance matrix: give --imatrix-text FILE (calibration text, "
                "not the text that is scored)"
            )
        stem = cache_name(self.source.path.stem.removesuffix("-bf16"))
        tag = f"-im{imatrix.stem.rsplit('-', 1)[-1]}" if imatrix else ""
        final = cache_dir() / f"{stem}-{self._source_key}-{kind}{tag}.gguf"
        if not final.is_file():
            self.say(f"quantising the baseline {kind}")
            argv = [str(self.tools.tool("llama-quantize"))]
            argv += ["--imatrix", str(imatrix)] if imatrix else []
            with atomic_path(final) as tmp:
                argv += [str(self.source.path), str(tmp), kind, str(self.threads)]
                run_tool(argv, self.tools.env, final.with_suffix(".log"))
        return final

    def imatrix(self) -> Path | None:
        """The importance matrix of the calibration text, made once; None without a text."""
        if self.imatrix_text is None or self._imatrix is not None:
            return self._imatrix
        text = self.imatrix_text.sha256[:8]
        window = self._imatrix_window()
        stem = cache_name(self.source.path.stem.removesuffix("-bf16"))
        final = cache_dir() / f"{stem}-{self._source_key}-imatrix-{text}.gguf"
        if not final.is_file():
            self.say(f"importance matrix from {self.imatrix_text.name}")
            with self.imatrix_text.as_file() as file, atomic_path(final) as tmp:
                argv = [str(self.tools.tool("llama-imatrix")), "-m", str(self.source.path)]
                argv += ["-f", str(file), "-o", str(tmp), "-t", str(self.threads)]
                argv += ["-c", str(window)]
                argv += ["--chunks", str(IMATRIX_CHUNKS), "--output-format", "gguf"]
                run_tool(argv, self.tools.env, final.with_suffix(".log"))
        self._imatrix = final
        return final

    def _imatrix_window(self) -> int:
        """Tokens in a window: the tool's own default, or what fits into a shorter context.

        Raises:
            PT2Error: the context is below 256 tokens, to whose multiples llama.cpp rounds up.
        """
        context = self.source.hparam("context_length", IMATRIX_WINDOW)
        if context < 256:
            raise PT2Error(
                f"{self.source.path} has a context of {context} tokens, and an importance matrix "
                "needs 256: leave --imatrix-text out"
            )
        return min(IMATRIX_WINDOW, context // 256 * 256)
