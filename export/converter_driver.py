"""Runs llama.cpp's own converter on a model whose ternary weights are replaced by row numbers.

A process of its own (``python -I converter_driver.py JOB.json``), because the converter brings its
own version of the ``gguf`` package, and apart from the working folder
(:mod:`pt2_core.process.isolated`). Python code of the model's folder is never run
(:mod:`pt2_core.process.foreign_code`).

It writes a *carrier*: a GGUF file with the model's metadata, tokenizer and chat template, all other
tensors folded and in float32, and for each ternary weight ``[rows, cols]`` a stand-in ``[rows, 3]``
in float32: the row's number, the weight's number in the job, and :data:`STAND_IN`. Whatever the
converter does to the weight (its name, the rows' order for rotary embeddings), it does to the
stand-in, and :mod:`export.converter` reads it off there.

The job: ``path`` (for sys.path), ``source`` (llama.cpp), ``model`` (folder),
``shown`` (the folder as messages name it), ``carrier`` (output),
``notes`` (output: a JSON list of what was mended or ignored), ``ternary`` (tensor name -> [rows,
cols]), ``orders`` (an .npz with ``rows/NAME`` and ``cols/NAME``), ``replaced`` (an .npz of tensors
that take the place of the checkpoint's, by its names), ``dropped`` (names of tensors that the files
hold and that do not count), ``outtype`` ("f32", or "bf16"),
``max_context`` (0: as the model), ``pre_tokenizer`` (a name or null), ``vocab`` (false: leave the
tokenizer out) and ``preflight`` (true: everything but reading weights and writing the carrier). On
failure the last line of stderr starts with ``converter:``, or with ``refused:`` where the line says
all there is to say, and the exit code is 3.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAILED = 3
MARK, REFUSED = "converter:", "refused:"
STAND_IN = -120121.0


def main(argv: list[str]) -> int:
    """Run the job file named by the only argument; 0, or :data:`FAILED` with one line on stderr."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    search_first(job)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    from export.settings import Unsupported
    from pt2_core.errors import PT2Error

    notes: list[str] = []
    try:
        run(job, notes)
        Path(job["notes"]).write_text(json.dumps(notes), encoding="utf-8")
    except (Unsupported, PT2Error) as e:
        print(f"{REFUSED} {_one_line(e, 4000)}", file=sys.stderr)
        return FAILED
    except Exception as e:
        logging.getLogger("export").error("the converter failed", exc_info=e)
        print(f"{MARK} {_one_line(e)}", file=sys.stderr)
        return FAILED
    return 0


def search_first(job: dict[str, Any]) -> None:
    """Set ``sys.path``: llama.cpp's packages, then the parent's; our own packages are loaded."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path.insert(0, root)
    # Their folders are known from here on, so that the root may go.
    import export  # noqa: F401
    import pt2_core  # noqa: F401

    own = [job["source"], str(Path(job["source"]) / "gguf-py")]
    sys.path[:] = [*own, *job["path"]]


def run(job: dict[str, Any], notes: list[str]) -> None:
    """Convert; raises whatever the converter raises.

    Args:
        notes: is added to: what was mended or ignored, in words.
    """
    from pt2_core.process import foreign_code

    folder = Path(job["model"])
    foreign_code.forbid()
    notes += foreign_code.check_folder(folder, tokenizer=job["vocab"])
    import torch

    with torch.inference_mode():
        model = load(job, notes)
        replace_tensors(model.model_tensors, job)
        true_parameter_count(model.gguf_writer, job["ternary"])
        if job["preflight"]:
            model.prepare_tensors()
            model.prepare_metadata(vocab_only=False)
            check_stand_ins(model.gguf_writer, job["ternary"])
            return
        # Its own progress bar would be drawn over ours.
        write = model.gguf_writer.write_tensors_to_file
        model.gguf_writer.write_tensors_to_file = lambda progress=False: write(progress=False)
        model.write()


def load(job: dict[str, Any], notes: list[str]) -> Any:
    """The converter's model of the folder, with the settings and the vocabulary mended."""
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    from export import converter_metadata, converter_vocab
    from export.settings import Unsupported

    folder = Path(job["model"])
    hparams = ModelBase.load_hparams(folder, False)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context = int(hparams.get("max_position_embeddings") or 0)
    try:
        kept, found = converter_metadata.settings(hparams, raw, job["max_context"])
    except Unsupported as e:
        raise Unsupported(f"{job['shown']}/config.json: {e}") from e
    notes += found
    if not converter_metadata.has_table(kept):
        kept = converter_metadata.with_older_names(kept, raw)
    model_class = get_model_class(get_model_architecture(kept, ModelType.TEXT))
    model_class.no_mtp = True  # layers for further tokens: transformers does not load them either
    if hasattr(model_class, "_is_qwen3_reranker"):  # guessed from the folder's name and its card
        model_class._is_qwen3_reranker = lambda self: False
    special: Any = gguf.SpecialVocab
    special._set_special_token = _sound_only(special._set_special_token)
    kinds = {"f32": gguf.LlamaFileType.ALL_F32, "bf16": gguf.LlamaFileType.MOSTLY_BF16}
    model = model_class(folder, kinds[job["outtype"]], Path(job["carrier"]), hparams=kept)
    model = getattr(model, "impl", model)  # Mistral3's is a shell around another class
    notes += converter_metadata.mend(model, context)
    if job["vocab"]:
        converter_vocab.install(model, job, notes)
    else:
        model.set_vocab = lambda: None
    return model


def _sound_only(theirs: Callable[..., None]) -> Callable[..., None]:
    """A negative id stands for "none" in some configs; the converter would stop at it."""

    def set_token(self: Any, kind: str, number: Any) -> None:
        if not (isinstance(number, int) and number < 0):
            theirs(self, kind, number)

    return set_token


def check_stand_ins(writer: Any, ternary: dict[str, Any]) -> None:
    """Raise ValueError unless every ternary weight arrives with its rows only reordered."""
    import gguf

    names, found = list(ternary), set()
    for tensors in writer.tensors:
        for name, info in tensors.items():
            if tuple(info.shape[1:]) != (3,):
                continue
            number = stand_in_number(name, data := gguf.LazyNumpyTensor.to_eager(info.tensor))
            if number is not None:
                check_rows(names[number], ternary[names[number]][0], data[:, 0])
                found.add(names[number])
    check_arrived(names, found)


def stand_in_number(name: str, data: Any) -> int | None:
    """The ternary weight's number when ``data`` ``[rows, 3]`` is a stand-in, else None.

    Raises:
        ValueError: it is made of several weights.
    """
    import numpy as np

    if data.ndim != 2 or not (data[:, 2] == STAND_IN).all():
        return None
    numbers = np.unique(data[:, 1])
    if len(numbers) != 1:
        raise ValueError(f"llama.cpp's converter joins several weights into {name}: unsupported")
    return int(numbers[0])


def check_rows(source: str, rows: int, column: Any) -> None:
    """Raise ValueError unless ``column`` float32 ``[n]`` is an order of the weight's rows."""
    import numpy as np

    if not np.array_equal(np.sort(column), np.arange(rows, dtype=np.float32)):
        raise ValueError(
            f"llama.cpp's converter does more to {source} than to order its rows, so it cannot be "
            "exported as ternary; leave it out with pt2-quantize --skip"
        )


def check_arrived(names: list[str], found: Any) -> None:
    """Raise ValueError where the converter has dropped a ternary weight."""
    lost = [n for n in names if n not in found]
    if lost:
        raise ValueError(f"llama.cpp's converter drops {lost[0]}: this architecture is unsupported")


def replace_tensors(tensors: dict[str, Callable[[], Any]], job: dict[str, Any]) -> None:
    """Put stand-ins in place of the ternary weights, and replaced and folded tensors in theirs.

    Raises:
        ValueError: the converter knows no tensor of a name that we need.
    """
    import numpy as np

    for name in job["dropped"]:
        tensors.pop(name, None)
    for number, (name, (rows, _cols)) in enumerate(job["ternary"].items()):
        _require(tensors, name)
        tensors[name] = _stand_in(rows, number)
    if job["preflight"] or not job["ternary"]:
        return
    orders, replaced = np.load(job["orders"]), np.load(job["replaced"])
    for name in replaced.files:
        _require(tensors, name)
        tensors[name] = _given(replaced[name])
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


def _one_line(e: Exception, most: int = 300) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
