"""Every reader of files: what it reads, and what of that would be wrong.

``judge`` gets what a reader accepted and says what is wrong with it, by rules written down here
once more rather than by the reader's own. ``sealed`` files have a checksum somewhere: a change that
is not signed again must be refused, or leave what is read as it was.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, load_file

from export.config import parse_size
from llamacpp_bench.results import load_results, to_json
from llamacpp_bench.show.compare import compare, remarks
from llamacpp_bench.show.merge import merge
from llamacpp_bench.show.published import load_published
from llamacpp_bench.show.tables import markdown
from pt2_core import formats
from pt2_core.artifact import sensitivity
from pt2_core.artifact.folder import MANIFEST, PROOF, RUN, Artifact, read_manifest, sha256_array
from pt2_core.artifact.manifest import check_errors
from pt2_core.artifact.proof import Proof
from pt2_core.digest import sha256_content
from pt2_core.files import read_json, sha256_file
from pt2_core.formats import DEFAULT, SMALLEST
from pt2_core.gguf_info import read_gguf
from pt2_core.model.fold_edges import edges_for
from pt2_core.safetensors_file import read_header
from pt2_llama.builds import STAMP, read_build
from quantize.config import Config, load_recipe
from quantize.report import stage_errors

from . import gguf_file, mutate, seeds

Judge = Callable[[Path, Any], "str | None"]


def _all_right(folder: Path, value: Any) -> None:
    return None


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        name: for ``--reader``.
        make: writes right files into a folder.
        files: names of those that are changed.
        read: a folder -> value; PT2Error where it refuses.
        judge: what is wrong with an accepted value, or None.
        sealed: names of files that have a checksum.
        seen: what must be the same where a change of a sealed file was accepted.
        sign: makes the checksums right again; False where the file is too broken for that.
        mutate: instead of the change that fits the file's ending.
    """

    name: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    judge: Judge = _all_right
    sealed: tuple[str, ...] = ()
    seen: Callable[[Any], Any] = repr
    sign: Callable[[Path, str], bool] | None = None
    mutate: Callable[[bytes, mutate.Rng], bytes] | None = None


def _finite(value: Any) -> bool:
    """Whether all numbers in nested lists and objects are."""
    if isinstance(value, dict):
        return all(_finite(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)


# safetensors, checkpoint --------------------------------------------------------------------------


def _judge_header(folder: Path, header: Any) -> str | None:
    """The library that reads the tensors afterwards must see the same."""
    with safe_open(folder / "tokens.safetensors", framework="numpy") as f:
        slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
        theirs = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    ours = {n: (t.dtype, t.shape) for n, t in header.items()}
    return None if ours == theirs else f"the library reads {theirs}, not {ours}"


def _read_checkpoint(folder: Path) -> Any:
    from pt2_core.model.checkpoint import Checkpoint

    model = Checkpoint.open(folder)
    shapes = {name: list(info.shape) for name, info in model.tensors.items()}
    return model, model.architecture, edges_for(model.raw_config, shapes)


def _judge_checkpoint(folder: Path, value: Any) -> str | None:
    model, _, edges = value
    if not _finite(model.raw_config):
        return "config.json has NaN or Inf"
    for edge in edges.edges.values() if edges is not None else ():
        if (h := edge.heads) is not None and (min(h.n_kv, h.dim) < 1 or h.n_head % h.n_kv):
            return f"heads {h}"
    shapes = [t.shape for t in model.tensors.values()]
    return None if all(type(n) is int for s in shapes for n in s) else "a shape of no integers"


# artifact -----------------------------------------------------------------------------------------


def _read_artifact(folder: Path) -> Any:
    artifact = Artifact.open(folder)
    blocks = [artifact.block(i) for i in range(artifact.n_blocks)]
    return artifact, blocks, artifact.replaced()


def _judge_artifact(folder: Path, value: Any) -> str | None:
    artifact, blocks, replaced = value
    held = {name: m for block in blocks for name, m in block.items()}
    if held.keys() != artifact.matrices.keys():
        return "manifest and blocks have other matrices"
    for name, m in held.items():
        stated = artifact.manifest["matrices"][name]
        weights = m.dequantize()
        if not np.isfinite(weights).all() or (m.alpha < 0).any():
            return f"{name} is not finite, or has a negative alpha"
        if weights.shape != (stated["rows"], stated["cols"]) or max(weights.shape) > 2**20:
            return f"{name} is of shape {weights.shape}"
        if stated.get("block_size", m.block_size) != m.block_size:
            return f"{name} has other blocks than the manifest says"
    size = artifact.manifest["settings"]["block_size"]
    if type(size) is not int or size < 1:
        return f"settings.block_size is {size!r}"
    for name, v in replaced.items():
        if not np.isfinite(v).all() or list(v.shape) != artifact.manifest["model"]["tensors"][name]:
            return f"{name} is not finite, or of another shape"
    return None if _finite(artifact.manifest) else "NaN in the manifest"


def _artifact_arrays(value: Any) -> Any:
    artifact, blocks, replaced = value
    parts = {f"{n}.{p}": sha256_array(getattr(m, p)) for b in blocks for n, m in b.items()
             for p in ("ternary", "alpha", "mu", "perm")}  # fmt: skip
    return (parts, sha256_array(artifact.residual_perm),
            {n: sha256_array(v) for n, v in replaced.items()})  # fmt: skip


def _sign_artifact(folder: Path, file: str) -> bool:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][file] = sha256_file(folder / file)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return True


def _read_errors(folder: Path) -> Any:
    manifest = read_manifest(folder)
    check_errors(manifest, folder / MANIFEST)
    return [stage_errors(manifest, key) for key in ("E_w", "E_x")]


def _judge_errors(folder: Path, value: Any) -> str | None:
    return None if _finite(value) else "errors that are not finite"


def _read_run(folder: Path) -> Any:
    return Artifact(folder, {}, np.empty(0)).source_model(None, "--model")


def _judge_proof(folder: Path, proof: Any) -> str | None:
    """What is compared with a file's predictions must be predictions."""
    if proof is None:
        return "no proof was read"
    probability = np.exp(proof.logprob.astype(np.float64))
    good = np.isfinite(probability).all() and proof.top.shape == proof.logprob.shape
    if not good or (probability > 1.01).any() or (proof.top < 0).any():
        return "predictions that cannot be"
    if len(proof.ids) != len(proof.lines) or proof.top.shape[0] != proof.tokens.shape[0]:
        return "lines or windows that do not fit"
    return None


# sensitivity, refinement --------------------------------------------------------------------------


def _judge_sensitivity(folder: Path, value: Any) -> str | None:
    matrices = read_manifest(folder)["matrices"]
    if value.linears.keys() != matrices.keys() or "embedding" not in value.tables:
        return "other linears or tables than the artifact's"
    for name, v in value.linears.items():
        good = np.isfinite(v.energy).all() and (v.energy >= 0).all() and v.error >= 0
        if not good or v.energy.shape != (matrices[name]["cols"],) or not _finite([v.gain]):
            return f"{name}: figures that cannot be"
    numbers = [value.kl, *value.tables.values(), *(v.error for v in value.linears.values())]
    return None if _finite(numbers) and value.tokens > 0 else "figures that are not finite"


def _rewrite_notes(file: Path, change: Callable[[dict[str, str]], None]) -> bool:
    """Change the metadata of a safetensors file as they stand in its header."""
    data = file.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + length])
        change(head["__metadata__"])
    except Exception:
        return False  # it is broken further out than the checksum: nothing to sign
    text = json.dumps(head).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return True


def _sign_sensitivity(folder: Path, file: str) -> bool:
    def change(notes: dict[str, str]) -> None:
        record = json.loads(notes["pt2"])
        record.pop("sha256", None)
        record["sha256"] = sha256_content(record, load_file(folder / file))
        notes["pt2"] = json.dumps(record)

    return _rewrite_notes(folder / file, change)


def _read_state(folder: Path) -> Any:
    from quantize.refinement.state import load_state

    return load_state(folder, seeds.IDENTITY)


def _judge_state(folder: Path, value: Any) -> str | None:
    tensors, record = value
    if not all(bool(t.isfinite().all()) for t in tensors.values()) or not _finite(record):
        return "values that are not finite"
    counts = (record["step"], record["looks_without_gain"], *(h["step"] for h in record["history"]))
    if not all(type(n) is int and n >= 0 for n in counts):
        return f"counts {counts}"
    figures = [*record["before"].values(), *record["best"].values(), record["elapsed"]]
    return None if all(type(v) in (int, float) for v in figures) else "figures that are none"


def _sign_state(folder: Path, file: str) -> bool:
    import torch

    from quantize.refinement.state import _digest

    def change(notes: dict[str, str]) -> None:
        arrays = {k: torch.from_numpy(v) for k, v in load((folder / file).read_bytes()).items()}
        content = {k: json.loads(notes[k]) for k in ("identity", "record")}
        notes["sha256"] = _digest(content, arrays)

    return _rewrite_notes(folder / file, change)


def _state_seen(value: Any) -> Any:
    return {k: v.tolist() for k, v in value[0].items()}, value[1]


def _read_tokens(folder: Path) -> Any:
    from quantize.calibration import read_tokens

    return read_tokens(folder / "tokens.safetensors", "calibration")


def _judge_tokens(folder: Path, value: Any) -> str | None:
    return None if value.dim() in (1, 2) and not value.is_floating_point() else "no token ids"


# llama.cpp's files and pt2-bench's ----------------------------------------------------------------


def _read_gguf(folder: Path) -> Any:
    info = read_gguf(folder / "m.gguf")
    figures = (info.bpw, info.parameters, info.decode_bytes(), info.kv_bytes_per_token())
    return info, figures, info.types(), info.main_type()


def _judge_gguf(folder: Path, value: Any) -> str | None:
    info, figures, _, _ = value
    if not _finite(figures) or min(figures) < 0 or figures[1] < 1:
        return f"figures {figures}"
    size = (folder / "m.gguf").stat().st_size
    if sum(t.nbytes for t in info.tensors) > size:
        return "more bytes of tensors than of the file"
    places = sorted((t.offset, t.offset + t.nbytes) for t in info.tensors)
    if any(a[1] > b[0] for a, b in pairwise(places)):
        return "tensors that overlap"
    if len({t.name for t in info.tensors}) < len(info.tensors):
        return "a tensor twice"
    known = {v[0] for k, v in gguf_file.TYPES.items() if k != "q8_t"}
    foreign = {t.type.id for t in info.tensors} - known
    return f"tensors of type {foreign}" if formats.Q8_T.id in foreign else None


def _read_results(folder: Path) -> Any:
    results = load_results(folder / "results.json")
    whole = merge([results, results])
    compare(results, whole)
    remarks(results, whole)
    return to_json(whole), markdown(results, []), markdown(whole, [])


def _judge_results(folder: Path, value: Any) -> str | None:
    if not _finite(value[0]) or any(w in value[1] for w in (" nan", " inf ")):
        return "figures that are not finite"
    return None


def _read_recipe(folder: Path) -> Any:
    return load_recipe(str(folder / "recipe.yaml"))


def _judge_recipe(folder: Path, value: Any) -> str | None:
    right = (
        isinstance(value, Config) and _finite(vars(value)) and value.block_size in (64, 128, 256)
    )
    return None if right else "a setting that cannot be"


def _judge_published(folder: Path, value: Any) -> str | None:
    numbers = [v for tests in value.speedup.values() for v in tests.values()]
    return None if all(math.isfinite(v) and v >= 0 for v in numbers) else "a speed that is none"


def _judge_stamp(folder: Path, value: Any) -> str | None:
    if value is None:  # damaged: there is no such build
        return None
    return None if all(isinstance(t, str) for t in value.stamp.tools) else "tools without names"


def _judge_json(folder: Path, value: Any) -> str | None:
    return None if _finite(value) else "NaN or Inf in JSON"


BLOCKS = tuple(f"block-{i:05d}.safetensors" for i in range(seeds.LAYERS))
TENSORS = (*BLOCKS, "global.safetensors", "replaced.safetensors")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

READERS = (
    Reader("safetensors", seeds.tokens, ("tokens.safetensors",),
           lambda d: read_header(d / "tokens.safetensors"), _judge_header),
    Reader("json", seeds.checkpoint, ("config.json",), lambda d: read_json(d / "config.json"),
           _judge_json),
    Reader("checkpoint", seeds.checkpoint,
           ("config.json", "model.safetensors.index.json", *SHARDS), _read_checkpoint,
           _judge_checkpoint),
    Reader("manifest", seeds.artifact, (MANIFEST,), _read_artifact, _judge_artifact),
    Reader("artifact", seeds.artifact, TENSORS, _read_artifact, _judge_artifact, TENSORS,
           _artifact_arrays, _sign_artifact),
    Reader("proof", seeds.artifact, (PROOF,), lambda d: Proof.read(Artifact.open(d)),
           _judge_proof, (PROOF,), repr, _sign_artifact),
    Reader("errors", seeds.artifact, (MANIFEST,), _read_errors, _judge_errors),
    Reader("run", seeds.artifact, (RUN,), _read_run),
    Reader("sensitivity", seeds.measured, (sensitivity.FILE,),
           lambda d: sensitivity.read(Artifact.open(d)), _judge_sensitivity, (sensitivity.FILE,),
           repr, _sign_sensitivity),
    Reader("refine-state", seeds.state, ("refine-state.safetensors",), _read_state, _judge_state,
           ("refine-state.safetensors",), _state_seen, _sign_state),
    Reader("tokens", seeds.tokens, ("tokens.safetensors",), _read_tokens, _judge_tokens),
    *(Reader(f"gguf-{kind}", partial(seeds.gguf, kind), ("m.gguf",), _read_gguf, _judge_gguf,
             mutate=partial(lambda file, data, rng: mutate.mutate_gguf(file, rng),
                            gguf_file.tiny_file(kind, layers=1)))
      for kind in (DEFAULT.ggml_name, SMALLEST.ggml_name, "q2_k", "f16")),
    Reader("results", seeds.results, ("results.json",), _read_results, _judge_results),
    Reader("recipe", seeds.texts, ("recipe.yaml",), _read_recipe, _judge_recipe),
    Reader("published", seeds.texts, ("published.yaml",),
           lambda d: load_published(d / "published.yaml"), _judge_published),
    Reader("stamp", seeds.stamp, (STAMP,), read_build, _judge_stamp),
    Reader("size", seeds.texts, ("size.txt",),
           lambda d: parse_size((d / "size.txt").read_text("utf-8", "replace"))),
)  # fmt: skip
