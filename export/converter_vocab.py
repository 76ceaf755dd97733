"""The tokenizer that a file gets: what transformers does with the folder, in llama.cpp's terms.

Runs in the process of :mod:`export.converter_driver`. :func:`install` takes the place of the
converter's own reading where that goes wrong:

- tokenizer.json alone decides where there is one, as in transformers; a tokenizer.model beside it
  gives token scores if it holds the same pieces.
- A SentencePiece-like vocabulary without tokenizer.model gets scores that make llama.cpp merge in
  the order of the merges, and the result is compared on a few texts.
- Vocabularies are padded up to the embeddings' rows; ids beyond them are refused.
- BOS and EOS are added, and a space put in front, where transformers is seen to do so.
- A byte-level tokenizer that the converter does not know by its hash is recognised by the regular
  expressions in tokenizer.json, or named with ``--pre-tokenizer``.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.settings import Unsupported

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
_TIKTOKEN_RANKS = "mergeable_ranks"  # what tiktoken's tokenizers have, and tokenizer.json has not

# Texts on which the merges are tried, without anything that a normaliser would change.
PROBES = (
    "The quick brown fox doesn't jump over 1,234.56 lazy dogs -- does it?",
    "def f(x: int) -> str:\n    return x * 2  # comment\n\n\treturn None",
    "Grüße aus Köln, naïve café; Привет, мир! 你好，世界。 שלום مرحبا नमस्ते 🙂",
    "two  spaces   and three, a tab\tand https://example.org/a_b?c=d&e=%20f",
    "unbelievable antidisestablishmentarianism internationalization HTTPServerError",
)

# The regular expressions of tokenizer.json -> the name of llama.cpp's pre-tokenizer with the same
# ones. The flag is the BPE model's ignore_merges, which llama.cpp ties to the name.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _CONTRACTIONS + _WORD + r"|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + _WORD + r"|\p{N}" + _REST
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*" + r"|\p{N}" + _TAIL
_GPT4O = (
    f"{_CASED}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _TAIL
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}


def install(model: Any, job: Mapping[str, Any], notes: list[str]) -> None:
    """Make the converter's model take its vocabulary from here.

    Args:
        model: the converter's model, not yet written.
        job: of the driver: ``source``, ``shown`` and ``pre_tokenizer`` (a name or None).
        notes: is added to, while the model is written.
    """
    folder = Path(model.dir_model)
    theirs = model.set_vocab
    if not (folder / "tokenizer.json").is_file() and (folder / "tekken.json").is_file():
        return

    def read(*_args: Any, **_kwargs: Any) -> None:
        tokenizer = _tokenizer(folder)
        rows = int(model.hparams["vocab_size"])
        _check_ids(tokenizer, rows, job["shown"])
        _vocabulary(model, tokenizer, rows, job, notes)

    def whole() -> None:
        try:
            theirs()
        except AttributeError as e:
            if _TIKTOKEN_RANKS not in str(e):
                raise
            # The class wants a tokenizer of Python code of the model's folder, which is never run.
            notes.append("vocabulary from tokenizer.json, not from a tokenizer of Python code")
            read()
        _settle(model, _tokenizer(folder), notes)

    # Whatever way the converter would take for this architecture, it ends here.
    for name in ("sentencepiece", "llama_hf", "gpt2", "hybriddna", "qwen"):
        setattr(model, f"_set_vocab_{name}", read)
    model.set_vocab = whole
    # Some classes write the vocabulary themselves, and only ask for the pre-tokenizer.
    value = _as_loaded(_tokenizer(folder), _json(folder / "tokenizer.json"))
    if value and family(value) == "byte-level":
        model.get_vocab_base_pre = _pre(type(model).get_vocab_base_pre, model, value, job, notes)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if folder not in _LOADED:
        _LOADED[folder] = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    return _LOADED[folder]


_LOADED: dict[Path, Any] = {}


def _check_ids(tokenizer: Any, rows: int, folder: str) -> None:
    """Raise Unsupported for tokens that have no row in the embeddings."""
    beyond = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        number, token = beyond[0]
        raise Unsupported(
            f"the tokenizer of {folder} has {len(beyond)} tokens from {number} ({token!r}) on to "
            f"{beyond[-1][0]}, but the embeddings have {rows} rows: give the tokenizer that "
            "belongs to these weights, or remove these tokens from it"
        )


def _vocabulary(
    model: Any, tokenizer: Any, rows: int, job: Mapping[str, Any], notes: list[str]
) -> None:
    folder = Path(model.dir_model)
    value = _as_loaded(tokenizer, _json(folder / "tokenizer.json"))
    kind = family(value) if value else _without_json(folder)
    if kind == "byte-level":
        model.get_vocab_base_pre = _pre(type(model).get_vocab_base_pre, model, value, job, notes)
        type(model)._set_vocab_gpt2(model)
    elif kind == "sentencepiece file":
        type(model)._set_vocab_sentencepiece(model)
    else:
        _sentencepiece_like(model, tokenizer, value, rows, notes)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
        raise Unsupported(f"{file} does not hold a tokenizer: copy the model's here again")
    return value


def _as_loaded(tokenizer: Any, value: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json as transformers uses it: some of its classes put their own parts in place."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not value or backend is None:
        return value
    return dict(json.loads(backend.to_str()))


def _without_json(folder: Path) -> str:
    return "sentencepiece file" if (folder / "tokenizer.model").is_file() else "byte-level"


def family(value: Mapping[str, Any]) -> str:
    """``byte-level``, ``bpe`` or ``unigram``: what the tokenizer of a tokenizer.json is.

    Raises:
        Unsupported: another kind, which llama.cpp does not have for these models.
    """
    kind = value["model"].get("type") or ("BPE" if "merges" in value["model"] else "?")
    parts = [p.get("type") for p in _parts(value.get("pre_tokenizer"), "pretokenizers")]
    parts += [p.get("type") for p in _parts(value.get("decoder"), "decoders")]
    if kind == "BPE":
        return "byte-level" if "ByteLevel" in parts else "bpe"
    if kind == "Unigram":
        return "unigram"
    raise Unsupported(f"tokenizer.json is of type {kind}, which llama.cpp does not have here")


def _parts(value: Any, key: str) -> list[dict[str, Any]]:
    """The members of a Sequence, or the thing itself."""
    if not isinstance(value, dict):
        return []
    if value.get("type") == "Sequence":
        return [p for v in value.get(key, []) for p in _parts(v, key)]
    return [value]


# Byte-level BPE: which pre-tokenizer.


def _pre(
    theirs: Callable[..., str], model: Any, value: Mapping[str, Any], job: Mapping[str, Any],
    notes: list[str],
) -> Callable[[Any], str]:  # fmt: skip
    def choose(tokenizer: Any) -> str:
        names = known_pre_tokenizers(Path(job["source"]))
        given = job.get("pre_tokenizer")
        if given:
            if given not in names:
                raise Unsupported(f"--pre-tokenizer {given!r}: give one of {', '.join(names)}")
            notes.append(f"pre-tokenizer {given} (--pre-tokenizer)")
            return str(given)
        try:
            return theirs(model, tokenizer)
        except NotImplementedError:
            pass
        name = by_structure(value)
        if name is None or name not in names:
            raise Unsupported(
                f"llama.cpp does not know the pre-tokenizer of {job['shown']}/tokenizer.json: "
                "if you know which it equals, give --pre-tokenizer NAME, one of " + ", ".join(names)
            )
        notes.append(f"pre-tokenizer {name}: the tokenizer has its regular expressions")
        return name

    return choose


def known_pre_tokenizers(source: Path) -> list[str]:
    """The names that llama.cpp's source accepts as ``tokenizer.ggml.pre``."""
    text = (source / "src" / "llama-vocab.cpp").read_text(encoding="utf-8")
    return sorted(set(re.findall(r'tokenizer_pre == "([^"]+)"', text)) - {"default"})


def by_structure(value: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for a tokenizer.json whose regular expressions are those of a known one."""
    normalizers = {p.get("type") for p in _parts(value.get("normalizer"), "normalizers")}
    if normalizers - {"NFC"}:
        return None
    regexes = []
    for part in _parts(value.get("pre_tokenizer"), "pretokenizers"):
        regex = _regex(part)
        if regex is None:
            return None
        regexes.append(regex)
    found = tuple(r for r in regexes if r)
    return PRE_TOKENIZERS.get((found, bool(value["model"].get("ignore_merges", False))))


def _regex(part: Mapping[str, Any]) -> str | None:
    """The expression of one pre-tokenizer, "" where it does not cut, None for an unknown one."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", False):
        return GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return r"\p{N}"
    if kind == "Split" and not part.get("invert") and part.get("behavior") == "Isolated":
        pattern = part.get("pattern", {})
        return pattern.get("Regex") if isinstance(pattern, dict) else None
    return None


# SentencePiece-like: scores and types.


def _sentencepiece_like(
    model: Any, tokenizer: Any, value: Mapping[str, Any], rows: int, notes: list[str]
) -> None:
    pieces = _pieces(value)
    scores, whence = _scores(value, pieces, Path(model.dir_model) / "tokenizer.model")
    texts = [f"[PAD{i}]" for i in range(rows)]
    values, types = [_UNUSED_SCORE] * rows, [UNUSED] * rows
    unknown = value["model"].get("unk_token")
    bytes_too = value["model"].get("byte_fallback", False)
    for text, number in pieces.items():
        texts[number], values[number] = text, scores.get(text, 0.0)
        is_byte = bytes_too and _BYTE.fullmatch(text)
        types[number] = BYTE if is_byte else UNKNOWN if text == unknown else NORMAL
    for added in value.get("added_tokens") or []:
        number, text = int(added["id"]), str(added["content"])
        special = added.get("special") or model.does_token_look_special(text)
        types[number] = CONTROL if special else USER_DEFINED
        texts[number] = text if special else text.replace(SPACE, " ")
        values[number] = _SPECIAL_SCORE
    if BYTE not in types:
        raise Unsupported(
            "tokenizer.json has no byte tokens (byte_fallback): llama.cpp "
            "cannot hold a SentencePiece-like vocabulary without them"
        )
    space = adds_space(tokenizer)
    _compare(tokenizer, texts, values, types, space, whence)
    if padded := types.count(UNUSED):
        notes.append(f"vocabulary padded with {padded} unused tokens up to {rows} embeddings")
    if whence != "tokenizer.model":
        notes.append(f"token scores from {whence}")
    writer = model.gguf_writer
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(values)
    writer.add_token_types(types)
    import gguf

    gguf.SpecialVocab(Path(model.dir_model), n_vocab=rows).add_to_gguf(writer)


def _pieces(value: Mapping[str, Any]) -> dict[str, int]:
    vocab = value["model"]["vocab"]
    if isinstance(vocab, dict):
        return {str(k): int(v) for k, v in vocab.items()}
    return {str(entry[0]): number for number, entry in enumerate(vocab)}


def _scores(
    value: Mapping[str, Any], pieces: Mapping[str, int], file: Path
) -> tuple[dict[str, float], str]:
    """Token -> score, and where the scores come from."""
    stored = _stored_scores(file, pieces)
    if stored is not None:
        return stored, "tokenizer.model"
    if value["model"].get("type") == "Unigram":
        return {str(t): float(s) for t, s in value["model"]["vocab"]}, "tokenizer.json (Unigram)"
    return merge_scores(value["model"].get("merges") or []), "the merges of tokenizer.json"


def _stored_scores(file: Path, pieces: Mapping[str, int]) -> dict[str, float] | None:
    """The scores of a tokenizer.model that holds the same pieces, else None."""
    if not file.is_file():
        return None
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):  # tiktoken's file of this name, for one
        return None
    if any(pieces.get(model.IdToPiece(i)) != i for i in range(model.vocab_size())):
        return None
    return {model.IdToPiece(i): model.GetScore(i) for i in range(model.vocab_size())}


def merge_scores(merges: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Token -> minus the rank of the first merge that makes it.

    llama.cpp merges the pair whose token has the highest score, BPE the pair of the lowest rank.
    """
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, float(-rank))
    return scores


def adds_space(tokenizer: Any) -> bool:
    """Whether a space is put in front of a text that has none."""
    ids = tokenizer.encode("a", add_special_tokens=False)
    return bool(ids) and str(tokenizer.convert_ids_to_tokens(ids)[0]).startswith(SPACE)


def _compare(
    tokenizer: Any, texts: list[str], scores: list[float], types: list[int], space: bool,
    whence: str,
) -> None:  # fmt: skip
    """Raise Unsupported where llama.cpp would cut a text into other tokens than transformers."""
    ids = {t: i for i, t in enumerate(texts) if types[i] not in (UNUSED, CONTROL)}
    first = {int(m[1], 16): i for i, t in enumerate(texts)
             if types[i] == BYTE and (m := _BYTE.fullmatch(t))}  # fmt: skip
    for text in PROBES:
        wanted = tokenizer.encode(text, add_special_tokens=False)
        found = spm_tokens((" " if space else "") + text, ids, scores, first)
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
            mine = [texts[i] for i in found[at : at + 4]]
            right = tokenizer.convert_ids_to_tokens(wanted[at : at + 4])
            raise Unsupported(
                f"llama.cpp would cut {text[:30]!r}... into other tokens than this tokenizer does "
                f"({mine} for {right}), with scores from {whence}: it cannot hold this tokenizer"
            )


def spm_tokens(
    text: str, ids: Mapping[str, int], scores: Sequence[float], byte_ids: Mapping[int, int]
) -> list[int]:
    """Token ids as llama.cpp's SentencePiece tokenizer makes them of a text without special tokens.

    Args:
        text: with the space in front, if one is added.
        ids: token -> id, ``scores`` by id, ``byte_ids``: byte -> id.
    """
    symbols: list[str] = list(text.replace(" ", SPACE))
    after = [*range(1, len(symbols)), -1] if symbols else []
    before = list(range(-1, len(symbols) - 1))
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            joined = symbols[left] + symbols[right]
            if joined in ids:
                heapq.heappush(queue, (-scores[ids[joined]], left, right, joined))

    for i in range(1, len(symbols)):
        offer(i - 1, i)
    while queue:
        _, left, right, joined = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    out = []
    for symbol in filter(None, symbols):
        known = symbol in ids
        out += [ids[symbol]] if known else [byte_ids.get(b, -1) for b in symbol.encode()]
    return out


# What transformers puts around a text.


def _settle(model: Any, tokenizer: Any, notes: list[str]) -> None:
    """Write what transformers is seen to do, and drop special tokens that do not exist."""
    writer, rows = model.gguf_writer, int(model.hparams["vocab_size"])
    keys = writer.kv_data[0]
    before, behind = around(tokenizer)
    if len(before) > 1 or len(behind) > 1:
        raise Unsupported(
            f"the tokenizer puts {len(before)} tokens before a text and {len(behind)} behind it; "
            "llama.cpp puts one at most"
        )
    for kind, found in (("bos", before), ("eos", behind)):
        key = f"tokenizer.ggml.{kind}_token_id"
        if found and key in keys and keys[key].value != found[0]:
            notes.append(f"the tokenizer adds token {found[0]} as {kind.upper()}: written so")
        if found:
            getattr(writer, f"add_{kind}_token_id")(found[0])
        getattr(writer, f"add_add_{kind}_token")(bool(found))
    for key in [k for k in keys if k.startswith("tokenizer.ggml.") and k.endswith("_token_id")]:
        if not 0 <= keys[key].value < rows:
            notes.append(f"{key} is {keys[key].value}, which is no token: left out")
            writer.remove_key(key)
    if keys["tokenizer.ggml.model"].value == "llama":
        writer.add_add_space_prefix(adds_space(tokenizer))
    else:
        writer.remove_key("tokenizer.ggml.add_space_prefix")


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that are added before and behind a text.

    Raises:
        Unsupported: the text's own tokens are not found in between.
    """
    plain = tokenizer.encode("Hello world", add_special_tokens=False)
    whole = tokenizer.encode("Hello world")
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise Unsupported("the tokenizer changes a text's tokens when it adds special ones")
