"""Benches of synthetic models: write the files of a shape, measure them, delete them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llamacpp_bench import speed
from llamacpp_bench.config import Config
from llamacpp_bench.results import Results
from llamacpp_bench.run.baselines import check_name
from llamacpp_bench.run.synthetic import (
    LABEL,
    Shape,
    check_disk,
    plan_file,
    recipe,
    write_synthetic,
)
from llamacpp_bench.run.tools import open_toolbox
from llamacpp_bench.session import Session, add_model, finish, start
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, human_seconds, make_folder
from pt2_core.gguf_info import read_gguf


def bench_synthetic(shapes: Sequence[Shape], types: Sequence[str], config: Config) -> Results:
    """Measure the speed of every type in every shape; one shape's files exist at a time.

    Ratios refer to Q2_K if it is among the types, else to the first type that is not ours.

    Raises:
        PT2Error: too little disk, a type the build cannot read, or a failing tool.
    """
    # Random weights have no perplexity and no baselines but each other.
    config = replace(config, perplexity=False, text=None, baselines=())
    tools = open_toolbox(config.variant, config.bin_dir)
    tools.tool("llama-quantize")  # tells which tensor gets which type
    if not tools.knows_pt2 and (ours := [t for t in types if t in formats.NAMES]):
        raise PT2Error(f"an unmodified llama.cpp cannot run {ours[0]}; use --variant cpu")
    session = start(config, tools, "synthetic-" + "-".join(s.name for s in shapes))
    session.results.config["synthetic"] = LABEL
    work = Path(config.work) if config.work else session.out / "models"
    make_folder(check_name(work))
    try:
        for shape in shapes:
            measure_shape(session, shape, types, work)
    finally:
        if not config.keep and work == session.out / "models" and not any(work.iterdir()):
            work.rmdir()
    return finish(session)


def measure_shape(session: Session, shape: Shape, types: Sequence[str], work: Path) -> None:
    """Write, measure and (unless they are to be kept) delete the files of one shape.

    Files kept by an earlier run are used if they fit, and stay.
    """
    files = {kind: work / f"synthetic-{shape.name}-{kind.lower()}.gguf" for kind in types}
    older = {path for path in files.values() if path.exists()}
    try:
        write_shape(session, shape, files)
        for kind, path in files.items():
            name = f"{shape.name} {kind}"
            add_model(session, read_gguf(path), name, LABEL, shape.name, hashed=False)
        session.results.baseline[shape.name] = f"{shape.name} {reference(types)}"
        speed.measure_group(session, shape.name)
    finally:
        if not session.config.keep:
            for path in set(files.values()) - older:
                path.unlink(missing_ok=True)


def reference(types: Sequence[str]) -> str:
    """The type that ratios refer to."""
    if "Q2_K" in types:
        return "Q2_K"
    return next((t for t in types if t not in formats.NAMES), types[0])


def write_shape(session: Session, shape: Shape, files: dict[str, Path]) -> None:
    """Write the files of one shape, after a check that the disk holds all of them."""
    recipes = {kind: recipe(session.tools, shape, kind, session.logs) for kind in files}
    plans = {kind: plan_file(shape, kind, recipes[kind]) for kind in files}
    todo = {k: p for k, p in files.items() if not is_written(p, plans[k][0], plans[k][2])}
    total = sum(plans[k][2] for k in todo)
    check_disk(next(iter(files.values())).parent, total)
    session.show.note(f"{shape.name}: writing {human_bytes(total)} of {LABEL.split(':')[0]}")
    started = time.monotonic()
    with session.show.phase("writing", total, "bytes") as show:
        for kind, path in todo.items():
            show.step(path.name, 0)
            write_synthetic(
                path, shape, kind, recipes[kind], on_bytes=lambda n: show.step(amount=n)
            )
    seconds = time.monotonic() - started
    if todo:
        rate = total / 1e9 / seconds
        session.show.note(f"{shape.name}: written in {human_seconds(seconds)} ({rate:.1f} GB/s)")


def is_written(path: Path, head: bytes, size: int) -> bool:
    """Whether a file kept from an earlier run has this very header and size."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as f:
        return f.read(len(head)) == head
