"""Runs llama.cpp's own converter on a model whose ternary weights are replaced by stand-ins.

A process of its own (``python -I converter_driver.py JOB.json``), because the converter brings its
own version of the ``gguf`` package, and apart from the working folder
(:mod:`pt2_core.process.isolated`). Python code of the model's folder is never run
(:mod:`pt2_core.process.foreign_code`).

It writes a *carrier*: a GGUF file with the model's metadata, tokenizer and chat template, and all
tensors that are not ternary, folded and in float32. A tensor made of ternary weights is not in it:
what the converter does to their stand-ins (:mod:`export.stand_ins`) says which row of which weight
each of its rows is. Where it does more than that, the weights must be given as values, and the
tensor is an ordinary one.

The job: ``path`` (for sys.path), ``source`` (llama.cpp), ``model`` (folder), ``shown`` (the folder
as messages name it), ``carrier`` (output), ``result`` (output, see below), ``tensors`` (names of
the checkpoint's tensors), ``ternary`` (tensor name -> shape in the file, number of its first
matrix, whether it is transposed), ``values`` (tensor name -> an .npy with what is to be written
where it cannot be ternary, folded), ``levels`` (tensor name -> how to give it, where an earlier
run has found that out), ``packed`` (name -> shape, of tensors that the files hold in another form)
and ``given`` (of these, the .npy with the values), ``orders`` (an .npz with ``rows/NAME`` and
``cols/NAME``), ``replaced`` (an .npz of tensors that take the place of the checkpoint's, by its
names), ``dropped`` (names of tensors that the files hold and that do not count), ``whole`` (true:
convert the model as it is), ``outtype`` ("f32", or "bf16" of a whole model), ``max_context`` (0: as
the model), ``pre_tokenizer`` (a name or null), ``vocab`` (false: leave the tokenizer out) and
``preflight`` (true: everything but reading weights and writing the carrier).

The result, JSON: ``notes`` (what was mended or ignored), ``levels``, ``reasons`` (tensor name ->
why it must be given as values), ``written`` (false where values are missing, so that there is no
carrier), ``lost`` (ternary tensors that the converter leaves out), ``tensors`` (a list of name,
shape, sources, whether it is ternary, whether its type is free); ``result`` with ``.npz`` behind
it holds ``N/which`` and ``N/row`` of ternary tensor N. On failure the last line of stderr starts
with ``converter:``, or with ``refused:`` where the line says all there is to say, and the exit code
is 3.
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


def main(argv: list[str]) -> int:
    """Run the job file named by the only argument; 0, or :data:`FAILED` with one line on stderr."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    search_first(job)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    from export.settings import Unsupported
    from pt2_core.errors import PT2Error

    try:
        result = run(job)
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
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


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Convert; returns the result, raises whatever the converter raises."""
    from pt2_core.process import foreign_code

    foreign_code.forbid()
    checked = foreign_code.check_folder(Path(job["model"]), tokenizer=job["vocab"])
    import torch

    with torch.inference_mode():
        if job["whole"]:
            notes: list[str] = []
            model = load(job, notes)
            for name in job["dropped"]:
                model.model_tensors.pop(name, None)
            _quiet(model.gguf_writer)
            model.write()
            return {"notes": [*checked, *notes]}
        return {**_convert(job), "checked": checked}


def _convert(job: dict[str, Any]) -> dict[str, Any]:
    """Convert with stand-ins, again and again until every ternary tensor is given as it can be."""
    import numpy as np

    from export.converter_tensors import Tensors
    from export.stand_ins import NARROW, VALUES, Levels

    levels = Levels({name: job["levels"].get(name, NARROW) for name in job["ternary"]})
    levels.reasons.update({n: w for n, w in job["reasons"].items() if n in levels.of})
    while True:
        notes: list[str] = []
        model = load(job, notes)
        tensors = Tensors(model, job, levels)
        try:
            model.prepare_tensors()
        except Exception as e:
            if not levels.failed(tensors.current, e):
                raise
            continue
        if not tensors.refused:
            break
    missing = [n for n, level in levels.of.items() if level == VALUES and n not in job["values"]]
    found = {"levels": levels.of, "reasons": levels.reasons, "written": False, "notes": notes}
    if missing and not job["preflight"]:
        return found
    # The size label is made of the parameters: ternary tensors are still among them here.
    tensors.full_precision()
    model.prepare_metadata(vocab_only=False)
    if not job["preflight"]:
        writer = model.gguf_writer
        tensors.drop_ternary()
        _quiet(writer)
        writer.write_header_to_file(path=model.fname_out)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()
        with open(f"{job['result']}.npz", "wb") as f:
            np.savez(f, **tensors.rows())  # type: ignore[arg-type]
        found["written"] = True
    return {**found, "lost": tensors.lost(), "tensors": tensors.listed}


def _quiet(writer: Any) -> None:
    """Its own progress bar would be drawn over ours."""
    write = writer.write_tensors_to_file
    writer.write_tensors_to_file = lambda progress=False: write(progress=False)


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


def _one_line(e: Exception, most: int = 300) -> str:
    text = " ".join(str(e).split()) or type(e).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
