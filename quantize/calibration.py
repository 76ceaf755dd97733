"""Calibration text to windows of token ids.

Policy: the text is tokenised as a whole without special tokens and cut into windows of ``seqlen``
tokens that do not overlap; ``samples`` of them are drawn with the seed. No BOS token is put in
front, as GPTQ and its followers have it; with ``bos`` it is, and each window loses its last token.
Token ids from a safetensors file are used as they are, the first ``samples`` rows of them.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantize.artifact import sha256_array
from quantize.common import PT2Error
from quantize.foreign_code import check_folder
from quantize.safetensors_file import read_header

TEXT_SUFFIXES = (".txt", ".raw", ".md", ".text")
# Data sets as GPTQ and the paper use them: (path, name, files, split, column, joined by)
DATASETS: dict[str, dict[str, Any]] = {
    "wikitext2": {
        "load": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "train"},
        "column": "text", "join": "\n\n",
    },
    "c4": {
        "load": {
            "path": "allenai/c4", "split": "train",
            "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
        },
        "column": "text", "join": "\n\n",
    },
    "ptb": {
        "load": {"path": "ptb-text-only/ptb_text_only", "name": "penn_treebank", "split": "train"},
        "column": "sentence", "join": " ",
    },
}  # fmt: skip
# c4 is far larger than any calibration needs: this many characters per wanted token are plenty.
CHARACTERS_PER_TOKEN = 40


@dataclass(frozen=True)
class Calibration:
    """Token ids int64 ``[samples, seqlen]`` and what the manifest says of them."""

    tokens: Tensor
    record: dict[str, Any]


def load_calibration(
    source: str, model_dir: Path, *, samples: int, seqlen: int, vocab: int, seed: int, bos: bool
) -> Calibration:
    """Read the calibration windows that a run uses.

    Args:
        source: a text file, a folder of text files, ``wikitext2``, ``c4``, ``ptb``, or
            ``file.safetensors`` / ``file.safetensors:tensor`` with integer token ids
            ``[n, len]`` or ``[len]``.
        model_dir: where the tokenizer is.
        vocab: ids must be below it.

    Raises:
        PT2Error: no such source, too few tokens (with the numbers), ids outside of the vocabulary,
            no tokenizer, or a data set that cannot be loaded.
    """
    stem, mark, tensor = source.partition(".safetensors")
    if mark and (tensor == "" or tensor.startswith(":")):
        tokens = _token_file(Path(stem + mark), tensor[1:], samples, seqlen)
        name = Path(stem + mark).name + tensor
    else:
        text, name = read_text(source, samples * seqlen * CHARACTERS_PER_TOKEN)
        tokenizer = load_tokenizer(model_dir)
        tokens = _windows(encode(tokenizer, text), name, samples, seqlen, seed)
        if bos:
            tokens = _with_bos(tokens, tokenizer)
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab:
        raise PT2Error(f"{name} has token ids outside of the model's vocabulary of {vocab}")
    digest = sha256_array(tokens.to(torch.int32).numpy())
    record = {"source": name, "tokens_sha256": digest, "samples": samples, "seqlen": seqlen}
    return Calibration(tokens, record)


def load_tokenizer(model_dir: Path) -> Any:
    """The model's own tokenizer, through transformers.

    Raises:
        PT2Error: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((model_dir / n).is_file() for n in names):
        raise PT2Error(f"{model_dir} has no tokenizer ({', '.join(names)}); copy the model's here")
    check_folder(model_dir)
    try:
        return AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as e:  # a broken file may raise nearly anything in there
        raise PT2Error(f"the tokenizer in {model_dir} cannot be read: {e}") from e


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    level = logging.getLogger("transformers").level
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of long texts; ours are
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    finally:
        logging.getLogger("transformers").setLevel(level)


def read_text(source: str, enough: int) -> tuple[str, str]:
    """The text of a file, of a folder's text files in the order of their names, or of a data set.

    Args:
        enough: characters after which a data set need not be read on.

    Returns:
        (text, the source's name without folders)
    """
    path = Path(source)
    if path.is_file():
        return _read_file(path), path.name
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise PT2Error(f"the folder {path} has no text files ({', '.join(TEXT_SUFFIXES)})")
        return "\n\n".join(_read_file(p) for p in files), path.resolve().name
    if source in DATASETS:
        return _dataset_text(source, enough), source
    raise PT2Error(
        f"no calibration text {source!r}: give a text file, a folder, FILE.safetensors:TENSOR, "
        f"or one of {', '.join(DATASETS)}"
    )


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise PT2Error(f"{path} is not UTF-8 text (byte {e.start})") from e
    except OSError as e:
        raise PT2Error(f"cannot read {path}: {e.strerror}") from e


def _dataset_text(name: str, enough: int) -> str:
    hint = "or give a text file with --calibration FILE"
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise PT2Error(f"data set {name} needs: pip install 'pt2-llm[data]'; {hint}") from e
    entry = DATASETS[name]
    try:
        rows = load_dataset(**entry["load"], streaming=True)
        parts: list[str] = []
        size = 0
        for row in rows:
            parts.append(row[entry["column"]])
            size += len(parts[-1])
            if size > enough:
                break
    except Exception as e:  # offline, gone, or changed: datasets has many exceptions
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise PT2Error(f"data set {name} cannot be loaded ({first}); {hint}") from e
    return entry["join"].join(parts)


def _windows(ids: list[int], name: str, samples: int, seqlen: int, seed: int) -> Tensor:
    have, need = len(ids), samples * seqlen
    if have < need:
        fit = have // seqlen
        advice = f"--samples {fit}" if fit else f"--seqlen {max(2, have // samples)}"
        raise PT2Error(
            f"{name} has {have} tokens, but {samples} samples of {seqlen} need {need}: "
            f"give more text, or use {advice}"
        )
    chosen = sorted(random.Random(seed).sample(range(have // seqlen), samples))
    return torch.tensor([ids[i * seqlen : (i + 1) * seqlen] for i in chosen], dtype=torch.int64)


def _with_bos(tokens: Tensor, tokenizer: Any) -> Tensor:
    if tokenizer.bos_token_id is None:
        raise PT2Error("this model's tokenizer has no BOS token: leave --bos out")
    first = torch.full_like(tokens[:, :1], tokenizer.bos_token_id)
    return torch.cat([first, tokens[:, :-1]], dim=1)


def _token_file(path: Path, tensor: str, samples: int, seqlen: int) -> Tensor:
    tokens = read_tokens(path, tensor)
    if tokens.dim() == 1:
        tokens = tokens[: tokens.shape[0] // seqlen * seqlen].reshape(-1, seqlen)
    if tokens.shape[0] < samples or tokens.shape[1] < seqlen:
        raise PT2Error(
            f"{path} has {tokens.shape[0]} rows of {tokens.shape[1]} tokens, but {samples} samples "
            f"of {seqlen} are wanted: set --samples and --seqlen to what is there"
        )
    return tokens[:samples, :seqlen].contiguous()


def read_tokens(path: Path, tensor: str = "") -> Tensor:
    """Token ids of a safetensors file, int64 ``[n, len]`` or ``[len]``.

    Args:
        tensor: its name; may be left out where the file has only one.

    Raises:
        PT2Error: no such file or tensor, or no integer tensor of one or two dimensions.
    """
    header = read_header(path)
    if not tensor and len(header) == 1:
        tensor = next(iter(header))
    if tensor not in header:
        raise PT2Error(f"{path} has no tensor {tensor!r}: write {path.name}:NAME with NAME one of "
                       f"{', '.join(header)}")  # fmt: skip
    info = header[tensor]
    if info.dtype not in ("I16", "U16", "I32", "I64", "U32") or len(info.shape) not in (1, 2):
        raise PT2Error(f"{path}:{tensor} is {info.dtype} {list(info.shape)}, not rows of token ids")
    try:
        with safe_open(path, framework="pt") as f:
            return f.get_tensor(tensor).to(torch.int64)
    except (SafetensorError, OSError) as e:
        raise PT2Error(f"{path} cannot be read: {e}") from e
