"""Runs llama.cpp's own converter on a model whose ternary weights are replaced by row numbers.

A process of its own (``python -m export.converter_driver JOB.json``), because the converter brings
its own version of the ``gguf`` package. It writes a *carrier*: a GGUF file with the model's
metadata, tokenizer and chat template, all other tensors folded and in float32, and for each
ternary weight ``[rows, cols]`` a stand-in ``[rows, 3]`` in float32: the row's number, the weight's
number in the job, and :data:`STAND_IN`. Whatever the converter does to the weight (its name, the
rows' order for rotary embeddings), it does to the stand-in, and :mod:`export.converter` reads it
off there.

The job: ``source`` (llama.cpp), ``model`` (folder), ``carrier`` (output), ``ternary`` (tensor name
-> [rows, cols]), ``orders`` (an .npz with ``rows/NAME`` and ``cols/NAME``), ``replaced`` (an .npz
of tensors that take the place of the checkpoint's, by its names), ``dropped`` (names of tensors
that the files hold and that do not count). On failure the last line of stderr starts with
``converter:`` and the exit code is 3.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAILED = 3
MARK = "converter:"
STAND_IN = -120121.0


def main(argv: list[str]) -> int:
    """Run the job file named by the only argument; 0, or :data:`FAILED` with one line on stderr."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    sys.path[:0] = [job["source"], str(Path(job["source"]) / "gguf-py")]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        run(job)
    except Exception as e:
        logging.getLogger("export").error("the converter failed", exc_info=e)
        print(f"{MARK} {_one_line(e)}", file=sys.stderr)
        return FAILED
    return 0


def run(job: dict[str, Any]) -> None:
    """Convert; raises whatever the converter raises."""
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    folder = Path(job["model"])
    with torch.inference_mode():
        hparams = ModelBase.load_hparams(folder, False)
        model_class = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        model = model_class(folder, gguf.LlamaFileType.ALL_F32, Path(job["carrier"]))
        replace_tensors(model.model_tensors, job)
        true_parameter_count(model.gguf_writer, job["ternary"])
        # Its own progress bar would be drawn over ours.
        write = model.gguf_writer.write_tensors_to_file
        model.gguf_writer.write_tensors_to_file = lambda progress=False: write(progress=False)
        model.write()


def replace_tensors(tensors: dict[str, Callable[[], Any]], job: dict[str, Any]) -> None:
    """Put stand-ins in place of the ternary weights, and replaced and folded tensors in theirs.

    Raises:
        ValueError: the converter knows no tensor of a name that we need.
    """
    import numpy as np

    for name in job["dropped"]:
        tensors.pop(name, None)
    orders, replaced = np.load(job["orders"]), np.load(job["replaced"])
    for name in replaced.files:
        _require(tensors, name)
        tensors[name] = _given(replaced[name])
    for number, (name, (rows, _cols)) in enumerate(job["ternary"].items()):
        _require(tensors, name)
        tensors[name] = _stand_in(rows, number)
    for key in orders.files:
        side, _, name = key.partition("/")
        if name in job["ternary"]:
            continue
        _require(tensors, name)
        tensors[name] = _reordered(tensors[name], orders[key], 0 if side == "rows" else 1)


def true_parameter_count(writer: Any, ternary: dict[str, tuple[int, int]]) -> None:
    """Make the writer count a ternary weight as ``rows * cols``: the size label is made of it."""
    count = writer.get_total_parameter_count
    hidden = sum(rows * (cols - 3) for rows, cols in ternary.values())

    def corrected() -> tuple[int, int, int, int]:
        total, shared, expert, n_expert = count()
        return total + hidden, shared + hidden, expert, n_expert

    writer.get_total_parameter_count = corrected


def _stand_in(rows: int, number: int) -> Callable[[], Any]:
    import torch

    lazy = _lazy_class()

    def make() -> Any:
        columns = [torch.arange(rows), torch.full((rows,), number), torch.full((rows,), STAND_IN)]
        return lazy.from_eager(torch.stack([c.to(torch.float32) for c in columns], dim=1))

    return make


def _given(value: Any) -> Callable[[], Any]:
    import torch

    lazy = _lazy_class()
    return lambda: lazy.from_eager(torch.from_numpy(value))


def _reordered(source: Callable[[], Any], order: Any, axis: int) -> Callable[[], Any]:
    """The tensor of ``source`` with axis ``axis`` in the given order, loaded when it is written."""
    import torch

    lazy = _lazy_class()
    index = torch.from_numpy(order.astype("int64"))

    def make() -> Any:
        tensor = source()
        if tensor.ndim <= axis or tensor.shape[axis] != len(index):
            raise ValueError(
                f"an order of {len(index)} does not fit a tensor {tuple(tensor.shape)}"
            )
        meta = lazy.meta_with_dtype_and_shape(tensor.dtype, tuple(tensor.shape))
        return lazy(meta=meta, args=(tensor,), func=lambda t: t.index_select(axis, index))

    return make


def _lazy_class() -> Any:
    from conversion.base import LazyTorchTensor

    return LazyTorchTensor


def _require(tensors: dict[str, Any], name: str) -> None:
    if name not in tensors:
        raise ValueError(f"llama.cpp's converter has no tensor {name} in this model")


def _one_line(e: Exception) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= 300 else text[:297] + "..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
