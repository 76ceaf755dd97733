"""The interleaved rounds of one group of models: where the work is done, then how fast it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from llamacpp_bench.results import Model, Sample
from llamacpp_bench.run.llama_bench import (
    batched_command,
    bench_command,
    interleave,
    run_batched,
    run_bench,
    test_name,
)
from llamacpp_bench.run.load import Load
from llamacpp_bench.run.placement import probe_placement
from llamacpp_bench.session import Session
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_seconds
from pt2_core.gguf_info import GGUFInfo


def measure_group(session: Session, group: str) -> None:
    """Where the models of a group run, then their interleaved rounds; saved after every run."""
    models = [m for m in session.results.models if m.group == group]
    load = session.config.load()
    started = time.monotonic()
    failed: set[str] = set()
    placed = models_to_place(session, models)
    if placed:
        with session.show.phase("placement", len(placed), "files") as show:
            for model in placed:
                show.step(model.name, 0)
                attempt(session, model, failed, lambda m=model: place(session, m, load))
                show.step()
        taken = human_seconds(time.monotonic() - started)
        session.show.note(f"placement of {len(placed)} files in {taken}")
    order = interleave(len(models), session.config.rounds)
    with session.show.phase("speed", len(order), "runs") as show:
        for round_, i in within(session, order, len(models), started, group):
            model = models[i]
            show.step(f"{model.name}, round {round_ + 1}/{session.config.rounds}", 0)
            if model.name not in failed:
                attempt(
                    session,
                    model,
                    failed,
                    lambda m=model, r=round_: measure_once(session, m, load, r),
                )
                session.save()
            show.step()


def models_to_place(session: Session, models: list[Model]) -> list[Model]:
    """Those whose placement was asked for."""
    which = session.config.placement
    if which == "ternary":
        return [m for m in models if m.types.keys() & set(formats.NAMES)]
    return models if which == "all" else []


def attempt(session: Session, model: Model, failed: set[str], work: Any) -> None:
    """Do a step of one model; under `keep_going` a failure only takes that model out of the run."""
    try:
        work()
    except PT2Error as e:
        if not session.config.keep_going:
            raise
        failed.add(model.name)
        session.results.failures.append(f"{model.name}: {e}")
        session.warn(f"{model.name} is left out from here on: {e}")


def within(
    session: Session, order: list[tuple[int, int]], per_round: int, started: float, group: str
) -> Iterator[tuple[int, int]]:
    """The runs of `order`, as long as a whole round still fits the group's time limit.

    The first round is always run. A later one begins only if the longest so far would end in time,
    because a round that some models lack says nothing of ratios.
    """
    limit = session.config.time_limit
    begun, longest = time.monotonic(), 0.0
    for n, run in enumerate(order):
        if n and n % per_round == 0:
            now = time.monotonic()
            session.show.note(f"round {n // per_round} in {human_seconds(now - begun)}")
            longest, begun = max(longest, now - begun), now
            if limit is not None and now - started + longest > limit:
                done, all_ = n // per_round, session.config.rounds
                name = f"{group}: " if group else ""
                session.warn(f"{name}{done} of {all_} rounds fit the limit of {limit:g} s")
                return
        yield run


def place(session: Session, model: Model, load: Load) -> None:
    """Ask llama.cpp's scheduler where the model's work is done; see :func:`probe_placement`."""
    log = session.log("placement", model.name)
    info = session.infos[model.name]
    model.placement, model.buffers = probe_placement(session.tools, info, load, log)
    model.device_bytes = device_bytes(info, model.buffers)
    check_placement(session, model)


def device_bytes(info: GGUFInfo, buffers: dict[str, float]) -> int:
    """Bytes of weights that one decoded token reads on GPUs; 0 where no weights are there.

    llama.cpp reports the size in MiB of each device's weights. Where that is more than the file
    has, a type is kept in another form there, and a token reads as much more.
    """
    found = sum(
        size
        for name, size in buffers.items()
        if name.endswith(" model") and not name.startswith("CPU") and "_Host" not in name
    )
    here = sum(t.nbytes for t in info.tensors)
    if any(t.name == "output.weight" for t in info.tensors):  # else the embeddings are the head
        here -= sum(t.nbytes for t in info.tensors if t.name == "token_embd.weight")
    if not found or not here:
        return 0
    return round(info.decode_bytes() * max(1.0, found * (1 << 20) / here))


def check_placement(session: Session, model: Model) -> None:
    """Say which operations of a GPU run landed on the CPU; an error with `strict`."""
    where = model.placement.elsewhere
    if not where:
        return
    shown = "; ".join(where[:4]) + (f"; and {len(where) - 4} more" if len(where) > 4 else "")
    text = f"{model.name}: {len(where)} operations ran on the CPU: {shown}"
    if session.config.strict:
        raise PT2Error(f"{text} (--strict)")
    session.warn(text)


def measure_once(session: Session, model: Model, load: Load, round_: int) -> None:
    """One round of one model: one call of each program that times it."""
    path = session.infos[model.name].path
    speeds: dict[str, float] = {}
    if load.plain:
        session.command(bench_command(session.tools, path, load))
        log = session.log("bench", model.name, f"round{round_}")
        entries, done = run_bench(session.tools, path, load, log)
        model.peak_rss = max(model.peak_rss, done.peak_rss)
        note_build(session, entries[0])
        speeds |= {test_name(e): fmean(map(float, e["samples_ts"])) for e in entries}
    if load.batches:
        session.command(batched_command(session.tools, path, load))
        log = session.log("batched", model.name, f"round{round_}")
        # its memory is not the model's peak at batch 1, which is what is reported
        batched, _ = run_batched(session.tools, path, load, log)
        speeds |= batched
    for test, speed in speeds.items():
        session.results.samples.append(Sample(model.name, test, round_, speed))


def note_build(session: Session, entry: dict[str, Any]) -> None:
    """Keep what llama-bench says of its build and of the devices."""
    for key in ("build_commit", "build_number", "backends", "cpu_info", "gpu_info"):
        session.results.build.setdefault(key, entry.get(key))
