"""What is measured: a Hugging Face model, an artifact or a GGUF file behind one small interface."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pt2_core.artifact.folder import MANIFEST, Artifact
from pt2_core.artifact.source import check_made_from
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.texts.tokens import bos_token, context_limit, encoder, load_tokenizer
from quantize.model.streamed import StreamedModel
from quantize.model.torch_setup import pick_device


class Model(Protocol):
    """A causal language model and its tokenizer.

    Attributes:
        name: for the table.
        kind: ``hf``, ``artifact`` or ``gguf``.
        size: bytes of the files.
        vocab: number of tokens.
        bos: the token put in front of a text, None where the tokenizer adds none.
        limit: the longest row of tokens that :meth:`logits` takes, None for any.
        context: tokens that the model was made for, None where it states nothing.
    """

    name: str
    kind: str
    size: int
    vocab: int
    bos: int | None
    limit: int | None
    context: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids; none is put around the text, special tokens in it are plain text."""

    def logits(self, tokens: Tensor) -> Tensor:
        """int64 ``[n, len]`` -> float32 ``[n, len, vocab]`` on the CPU or the model's device."""


class TorchModel:
    """A checkpoint in PyTorch, as it is or with an artifact's ternary weights."""

    def __init__(
        self, path: Path, device: str, dtype: str, artifact: Artifact | None = None
    ) -> None:
        checkpoint = Checkpoint.open(path)
        self.device = pick_device(device)
        self.kind = "hf" if artifact is None else "artifact"
        folder = path if artifact is None else artifact.path
        self.name = folder.resolve().name
        names = checkpoint.shards if artifact is None else list(artifact.manifest["files"])
        self.size = sum((folder / name).stat().st_size for name in names)
        if artifact is not None:
            check_made_from(artifact, checkpoint, "--source")
            checkpoint.replaced = {k: torch.from_numpy(v) for k, v in artifact.replaced().items()}
        model = StreamedModel(checkpoint, self.device, dtype)
        self.vocab = int(model.config.vocab_size)
        self.limit = self.context = context_limit(checkpoint.raw_config)
        self._model = model.whole(lambda index: _ternary(artifact, index))
        tokenizer = load_tokenizer(path)
        self.bos, self._encode = bos_token(tokenizer), encoder(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._model(input_ids=tokens.to(self.device), use_cache=False).logits
        return found.float()


class GgufModel:
    """A GGUF file in our llama.cpp, through llama-cpp-python's bindings."""

    def __init__(self, path: Path, context: int, threads: int, gpu_layers: int) -> None:
        Llama = _bindings()
        more = {"n_threads": threads, "n_threads_batch": threads} if threads else {}
        try:
            self._llama = Llama(
                model_path=str(path), n_ctx=context, n_batch=context, n_ubatch=min(context, 512),
                logits_all=True, n_gpu_layers=gpu_layers, verbose=False, **more,
            )  # fmt: skip
        except (ValueError, RuntimeError, AssertionError) as e:
            raise PT2Error(f"llama.cpp cannot load {path}: {e}") from e
        self.name, self.kind = path.name, "gguf"
        self.size = path.stat().st_size
        self.vocab = self._llama.n_vocab()
        self.limit: int | None = context
        self.context = _stated_context(self._llama.metadata)
        added = self._llama.tokenize(b"a", add_bos=True)
        plain = self._llama.tokenize(b"a", add_bos=False)
        self.bos = int(added[0]) if len(added) > len(plain) else None

    def encode(self, text: str) -> list[int]:
        return list(self._llama.tokenize(text.encode("utf-8"), add_bos=False, special=False))

    def logits(self, tokens: Tensor) -> Tensor:
        rows = []
        for row in tokens.tolist():
            if self.limit is not None and len(row) > self.limit:
                raise PT2Error(f"{self.name}: {len(row)} tokens in a context of {self.limit}")
            self._llama.reset()
            self._llama.eval(row)
            rows.append(torch.from_numpy(self._llama.scores[: len(row)].copy()))
        return torch.stack(rows)


def open_model(
    path: str | os.PathLike[str], *, source: str | None = None, device: str = "auto",
    dtype: str = "float32", context: int = 2048, threads: int = 0, gpu_layers: int = -1,
) -> Model:  # fmt: skip
    """Open whatever is at ``path``.

    Args:
        source: the model that an artifact was made from; None takes what the artifact says.
        context: tokens that a GGUF model is opened for.
        gpu_layers: of a GGUF model, -1 for all; without a GPU in the build they stay on the CPU.

    Raises:
        PT2Error: nothing usable is there.
    """
    where = Path(path)
    if where.suffix == ".gguf":
        if not where.is_file():
            raise PT2Error(f"there is no file {where}")
        return GgufModel(where, context, threads, gpu_layers)
    if (where / MANIFEST).is_file():
        artifact = Artifact.open(where)
        return TorchModel(artifact.source_model(source, "--source"), device, dtype, artifact)
    return TorchModel(where, device, dtype)


def _ternary(artifact: Artifact | None, index: int) -> dict[str, Tensor] | None:
    """The weights of a decoder block's matrices in an artifact."""
    if artifact is None:
        return None
    return {n: torch.from_numpy(m.dequantize()) for n, m in artifact.block(index).items()}


def _stated_context(metadata: Mapping[str, str]) -> int | None:
    """What a GGUF file's ``ARCHITECTURE.context_length`` says."""
    value = metadata.get(f"{metadata.get('general.architecture')}.context_length", "")
    return int(value) if value.isdigit() and int(value) else None


def _bindings() -> Any:
    """``llama_cpp.Llama`` on the libraries of our build."""
    from pt2_llama import api

    # The bindings load their library when they are imported, from where this points to.
    if "LLAMA_CPP_LIB_PATH" not in os.environ:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(api.require_build().lib_dir)
    try:
        return importlib.import_module("llama_cpp").Llama
    except ImportError as e:
        raise PT2Error(
            "GGUF files need llama-cpp-python's bindings (our llama.cpp takes the place of its "
            "own); run: pt2-llama bindings"
        ) from e
    except (FileNotFoundError, RuntimeError, OSError) as e:
        raise PT2Error(f"llama.cpp's library cannot be loaded: {e}; run: pt2-llama doctor") from e
