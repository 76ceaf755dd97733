"""Texts as token ids: tokenizers, token files, and the windows of both protocols.

Special tokens that are written in a text are plain text, as llama-perplexity and llama-imatrix read
them; added tokens that are not special (spaces, say) are tokens everywhere. Importing this module
loads neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pt2_core.errors import PT2Error
from pt2_core.process.temporary import temporary_folder
from pt2_core.safetensors_file import read_header
from pt2_core.texts.sources import CHARACTERS_PER_TOKEN, read_text, split_sources, token_source

if TYPE_CHECKING:
    from torch import Tensor

# How a text is cut into windows and what of a window is scored, by one name in all tools:
# ``papers``     BOS before the text where the tokenizer adds one; every token of a window but its
#                first is scored.
# ``llama.cpp``  the tokenizer's BOS in the first place of every window; its second half is scored.
PROTOCOLS = ("papers", "llama.cpp")
OLD_NAMES = {"gptq": "papers", "windows": "papers"}  # in results of earlier versions
TOKEN_DTYPES = ("I16", "U16", "I32", "I64", "U32")

# What of token ids is judged, and what is refused; see :func:`refuse_degenerate_tokens`.
JUDGED_TOKENS = 512
MIN_DISTINCT = 32
MAX_SHARE = 0.5
MAX_PACKING = 30


@dataclass(frozen=True)
class Stream:
    """Token ids int64 ``[n]`` of one source or several, and the field read of JSON records."""

    ids: Tensor
    field: str | None
    notes: tuple[str, ...]


def has_tokenizer(model_dir: Path) -> bool:
    """Whether a model's folder has a tokenizer's files."""
    from pt2_core.model.tokenizer_files import VOCABULARIES, tokenizer_files

    return bool(set(VOCABULARIES) & set(tokenizer_files(model_dir)[0]))


def load_tokenizer(model_dir: Path) -> Any:
    """The model's own tokenizer, through transformers; no code of the folder is run.

    Raises:
        PT2Error: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    from pt2_core.model.tokenizer_files import VOCABULARIES, tokenizer_files
    from pt2_core.model.view import write_tokenizer_view

    names, _ = tokenizer_files(model_dir)
    if not has_tokenizer(model_dir):
        raise PT2Error(
            f"{model_dir} has no tokenizer ({', '.join(VOCABULARIES)}); copy the model's here"
        )
    try:
        with temporary_folder(Path(tempfile.gettempdir()), "pt2-tokenizer-") as folder:
            write_tokenizer_view(model_dir, folder, names)
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # a broken file may raise nearly anything in there
        raise PT2Error(f"the tokenizer in {model_dir} cannot be read: {e}") from e


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text; none is put around it, and special tokens in it are plain text."""
    return encoder(tokenizer)(text)


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """:func:`encode` of one tokenizer, prepared once for many texts."""
    added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
    hidden = [t for t in added if looks_special(t)]
    plain: dict[str, bool] = {"add_special_tokens": False, "split_special_tokens": True}
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        kept = [t for t in added if t not in hidden]
        return lambda text: _encode_slow(tokenizer, text, kept)
    if hidden:
        inside = _with_special(tokenizer, hidden)
        return lambda text: inside.encode(text, add_special_tokens=False).ids

    def fast(text: str) -> list[int]:
        with _silent():
            return tokenizer.encode(text, **plain)

    return fast


def bos_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer itself puts in front of a text, None where it puts none."""
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and tokenizer.encode("a")[:1] == [bos] else None


def looks_special(token: str) -> bool:
    """Whether llama.cpp's converter makes a control token of an added token not called special."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _with_special(tokenizer: Any, tokens: list[str]) -> Any:
    """A copy of a fast tokenizer's inside in which these added tokens are special, too."""
    from tokenizers import Tokenizer

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in raw["added_tokens"]:
        entry["special"] = entry["special"] or entry["content"] in tokens
    raw["truncation"] = raw["padding"] = None
    copy = Tokenizer.from_str(json.dumps(raw))
    copy.encode_special_tokens = True
    return copy


def _encode_slow(tokenizer: Any, text: str, kept: list[str]) -> list[int]:
    """Of a tokenizer in Python, which keeps all added tokens from being found, or none of them.

    Args:
        kept: added tokens that are tokens in a text, too.
    """
    parts = [text]
    if kept:
        longest_first = sorted(kept, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids: list[int] = []
    with _silent():
        for part in filter(None, parts):
            if part in kept:
                ids.append(tokenizer.convert_tokens_to_ids(part))
            else:
                ids += tokenizer.encode(part, add_special_tokens=False, split_special_tokens=True)
    return ids


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' warning of texts longer than the model's context: ours are."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_tokens(path: Path, tensor: str = "") -> Tensor:
    """Token ids of a safetensors file, int64 ``[n, len]`` or ``[len]``.

    Args:
        tensor: its name; may be left out where the file has only one.

    Raises:
        PT2Error: no such file or tensor, or no integer tensor of one or two dimensions.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    if not tensor and len(header) == 1:
        tensor = next(iter(header))
    if tensor not in header:
        raise PT2Error(f"{path} has no tensor {tensor!r}: write {path.name}:NAME with NAME one of "
                       f"{', '.join(header)}")  # fmt: skip
    info = header[tensor]
    if info.dtype not in TOKEN_DTYPES or len(info.shape) not in (1, 2):
        raise PT2Error(f"{path}:{tensor} is {info.dtype} {list(info.shape)}, not rows of token ids")
    try:
        with safe_open(path, framework="pt") as f:
            return f.get_tensor(tensor).to(torch.int64)
    except (SafetensorError, OSError) as e:
        raise PT2Error(f"{path} cannot be read: {e}") from e


def stream(
    sources: str, model_dir: Path, vocab: int, *, wanted: int, text_field: str | None = None
) -> Stream:
    """The tokens of one source or several, one after the other.

    Args:
        sources: as :func:`pt2_core.texts.sources.read_text` has them, or
        ``FILE.safetensors[:TENSOR]``.
        vocab: ids must be below it.
        wanted: tokens; of a data set no more is read than they need.

    Raises:
        PT2Error: no such source or tokenizer, ids outside of the vocabulary, or ``text_field``
            has nothing to read.
    """
    import torch

    parts: list[Tensor] = []
    fields: list[str] = []
    notes: list[str] = []
    tokenizer = None
    for source in split_sources(sources):
        tokens = token_source(source)
        if tokens is not None:
            ids = read_tokens(*tokens).flatten()
        else:
            text = read_text(source, text_field=text_field, enough=wanted * CHARACTERS_PER_TOKEN)
            tokenizer = tokenizer or load_tokenizer(model_dir)
            ids = torch.tensor(encode(tokenizer, text.text), dtype=torch.int64)
            fields += [text.field] if text.field else []
            notes += text.notes
        check_vocabulary(ids, vocab, source)
        parts.append(ids)
    if text_field is not None and not fields:
        raise PT2Error(f"--text-field {text_field}: {sources} has no JSON records")
    return Stream(torch.cat(parts), ",".join(dict.fromkeys(fields)) or None, tuple(notes))


def check_vocabulary(ids: Tensor, vocab: int, name: str) -> None:
    """Refuse token ids that a model with ``vocab`` tokens does not have."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab):
        raise PT2Error(f"{name} has token ids outside of the model's vocabulary of {vocab}")


def refuse_degenerate_tokens(tokens: Tensor, name: str) -> None:
    """Refuse token ids of no real text, where there are enough of them to tell.

    From 512 tokens on: fewer than 32 different ones, more than half of them the same one, or such
    that zlib packs more than 30 times smaller (as 32-bit numbers; real text is packed about 3
    times), which are the same passages over and over.

    Args:
        tokens: any shape.

    Raises:
        PT2Error: with what was seen.
    """
    import torch

    count = tokens.numel()
    if count < JUDGED_TOKENS:
        return
    found, times = tokens.unique(return_counts=True)
    most = int(times.argmax())
    data = tokens.contiguous().to(torch.int32).numpy().tobytes()
    packing = len(data) / len(zlib.compress(data, 1))
    if len(found) < MIN_DISTINCT:
        what = f"only {len(found)} different tokens in {count}"
    elif int(times[most]) > MAX_SHARE * count:
        share = int(times[most]) / count
        what = f"{count} tokens of which {share:.0%} are the same one (id {int(found[most])})"
    elif packing > MAX_PACKING:
        what = f"the same tokens over and over (zlib packs them {packing:.0f} times smaller)"
    else:
        return
    raise PT2Error(f"{name} has {what}: give a text as the model would read it")


def llama_windows(
    ids: list[int], bos: int | None, ctx: int, limit: int | None = None, name: str = "the text"
) -> Tensor:
    """Cut a text's tokens as llama-perplexity does, int64 ``[n, ctx]``.

    Args:
        bos: where the tokenizer adds one: put before the text, and in the first place of every
            window.
        limit: the first so many windows only.
    """
    import torch

    ids = ([] if bos is None else [bos]) + ids
    count = len(ids) // ctx
    if count == 0:
        raise PT2Error(f"{name} has {len(ids)} tokens, fewer than one window of {ctx}")
    found = torch.tensor(ids[: count * ctx]).view(count, ctx)[:limit].clone()
    if bos is not None:
        found[:, 0] = bos
    return found


def paper_windows(
    ids: list[int], bos: int | None, ctx: int, limit: int | None = None, name: str = "the text"
) -> Tensor:
    """Cut a text's tokens as the papers do, int64 ``[n, ctx]``.

    Of a text that is shorter than a window, the text: ``[1, len]``.

    Args:
        bos: where the tokenizer adds one: put before the text.
        limit: the first so many windows only.
    """
    import torch

    ids = ([] if bos is None else [bos]) + ids
    if len(ids) < 3:
        raise PT2Error(f"{name} is too short to be measured")
    count = max(1, len(ids) // ctx)
    return torch.tensor(ids[: count * ctx]).view(count, -1)[:limit]


def context_limit(config: Mapping[str, Any]) -> int | None:
    """``max_position_embeddings`` as a model's config.json states it, None where it does not.

    A config of parts (text, vision) has it in the text's.
    """
    for part in (config, config.get("text_config")):
        value = part.get("max_position_embeddings") if isinstance(part, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def check_context(
    length: int, limit: int | None, name: str, option: str, *, allow: bool,
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    """Refuse windows longer than the context that a model states.

    Args:
        length: tokens in a window.
        limit: of the model, None where it states none, which is said.
        option: what to use instead, with a blank before the limit.
        allow: ``--allow-long`` was given; too long windows are then said.

    Raises:
        PT2Error: too long, and not allowed.
    """
    if limit is None:
        warn(f"{name} states no max_position_embeddings: no limit of its context is known")
    elif length > limit and allow:
        warn(f"windows of {length} tokens are longer than the {limit} that {name} was made for")
    elif length > limit:
        raise PT2Error(
            f"{name} takes at most {limit} tokens, and a window has {length}: use {option} "
            f"{limit}, or --allow-long to go beyond its context"
        )
