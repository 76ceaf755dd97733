"""State of a run, and the steps that every run begins and ends with."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from llamacpp_bench.config import MIN_ROUNDS, Config
from llamacpp_bench.results import Model, Results
from llamacpp_bench.run import memory
from llamacpp_bench.run.baselines import FLOAT_TYPES
from llamacpp_bench.run.llama_bench import shown_command
from llamacpp_bench.run.machine import describe_machine
from llamacpp_bench.run.tools import ToolBox
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, make_folder, sha256_file
from pt2_core.gguf_info import GGUFInfo
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.sources import Text, source_name


@dataclass
class Session:
    """State of one run, shared by its steps."""

    config: Config
    tools: ToolBox
    out: Path
    show: Reporter
    results: Results
    text: Text | None = None
    infos: dict[str, GGUFInfo] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        return self.out / "logs"

    def save(self) -> None:
        self.results.save(self.out / "results.json")

    def warn(self, text: str) -> None:
        self.results.warnings.append(text)
        self.show.warn(text)

    def command(self, argv: Sequence[str | Path]) -> None:
        """Keep a command for the record, once."""
        text = shown_command(argv)
        if text not in self.results.commands:
            self.results.commands.append(text)

    def log(self, *words: str) -> Path:
        return self.logs / (re.sub(r"[^A-Za-z0-9.+_-]+", "-", "-".join(words)) + ".log")


def start(config: Config, tools: ToolBox, stem: str, text: Text | None = None) -> Session:
    """Make the output folder, describe the machine and measure its memory bandwidth.

    Args:
        text: what is scored, if anything.
    """
    check_load(config)
    for name in needed_tools(config):
        tools.tool(name)
    show = open_reporter(config.quiet)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    out = Path(config.out) if config.out else Path(f"bench-{stem}-{stamp}")
    make_folder(out / "logs")
    machine = describe_machine()
    build = {"description": tools.description, "variant": tools.variant}
    results = Results(machine, build, describe_config(config, text))
    session = Session(config, tools, out, show, results, text)
    say_notes(session, text)
    if config.rounds < MIN_ROUNDS:
        session.warn(f"only {config.rounds} rounds; at least {MIN_ROUNDS} are needed to trust them")
    if machine["load_average"] > 0.5:
        session.warn(
            f"the machine is busy (load average {machine['load_average']} on {machine['cores']} "
            "cores): the speeds are too low and noisy"
        )
    results.bandwidth = measure_bandwidth(session)
    return session


def say_notes(session: Session, text: Text | None) -> None:
    """Say what was done to a text, and whether llama.cpp's tools get it in another file."""
    for note in text.notes if text is not None else ():
        session.show.note(note)
    if text is not None and text.file is None:
        session.show.note(f"llama.cpp's tools get {text.name} as read here, in a temporary file")


def check_load(config: Config) -> None:
    """Refuse options that leave nothing to time."""
    if config.rounds < 1:
        raise PT2Error(f"-r {config.rounds}: at least one round is needed")
    if config.strict and config.placement != "all":
        raise PT2Error(f"--strict looks at every file: not with --placement {config.placement}")
    load = config.load()
    if not (load.plain or load.batches):
        raise PT2Error("-p 0 -n 0 --pg none and no --batch: nothing is left to time")
    if load.batches and (not load.batch_gen or 0 in load.batches):
        raise PT2Error("--batch needs numbers of at least 1, and -n or --batch-gen of at least 1")


def needed_tools(config: Config) -> list[str]:
    """The programs a run will call, so that a missing one is said before anything is measured."""
    names = ["llama-bench"] if config.load().plain or config.placement != "none" else []
    names += ["llama-batched-bench"] if config.batches else []
    names += ["llama-perplexity"] if config.perplexity else []
    made = [w.type for w in config.baselines if w.type and w.type not in FLOAT_TYPES]
    names += ["llama-quantize"] if made else []
    return names + (["llama-imatrix"] if made and config.imatrix_text else [])


def describe_config(config: Config, text: Text | None) -> dict[str, Any]:
    """The configuration for the record: paths by name only, baselines by label."""
    raw = asdict(config)
    raw |= {"threads": config.load().threads, "pg": config.load().pg}
    raw["baselines"] = [w.label for w in config.baselines]
    for key in ("source", "bin_dir", "bandwidth_program", "out", "work"):
        raw[key] = Path(raw[key]).name if raw[key] else None
    for key in ("imatrix_text", "text"):
        raw[key] = source_name(raw[key]) if raw[key] else None
    raw["text_sha256"] = None if text is None else text.sha256
    return dict(json.loads(json.dumps(raw)))  # tuples become the lists that a reader will see


def measure_bandwidth(session: Session) -> dict[str, Any]:
    """Bytes per second that the memory (of the GPU, in a CUDA run) can be read at."""
    config = session.config
    if config.bandwidth is not None:
        return {"bytes_per_second": config.bandwidth, "method": "given", "note": ""}
    session.show.note("measuring the memory bandwidth")
    if config.bandwidth_program is not None:
        found = memory.measure_by_program(config.bandwidth_program, session.log("bandwidth"))
    elif session.tools.variant == "cuda":
        found = memory.measure_gpu()
    else:
        found = memory.measure_cpu(config.load().threads or 1)
    if found.note:
        session.warn(f"memory bandwidth: {found.note}")
    return asdict(found)


def add_model(
    session: Session, info: GGUFInfo, name: str, origin: str, group: str = "", hashed: bool = True
) -> Model:
    """Enter a file into the comparison, under a name that no other has.

    Raises:
        PT2Error: its types are not readable by the build in use.
    """
    pt2 = sorted({t.type.name for t in info.tensors} & set(formats.NAMES))
    if pt2 and not session.tools.knows_pt2:
        raise PT2Error(
            f"{info.path} has {pt2[0]} tensors, which an unmodified llama.cpp cannot read; "
            "use --variant cpu, or export it with --type q2_k"
        )
    unique, n = name, 1
    while unique in session.infos:
        n += 1
        unique = f"{name} ({n})"
    model = Model(
        name=unique,
        file=info.path.name,
        origin=origin,
        file_bytes=info.file_bytes,
        sha256=sha256_file(info.path) if hashed else "",
        parameters=info.parameters,
        bpw=info.bpw,
        main_type=info.main_type(),
        types=info.types(),
        decode_bytes=info.decode_bytes(),
        kv_bytes=info.kv_bytes_per_token(),
        group=group,
    )
    session.infos[unique] = info
    session.results.models.append(model)
    return model


def finish(session: Session) -> Results:
    """Write every output."""
    cached = [m for m in session.results.models if m.decode_bytes < 2 * memory.last_level_cache()]
    if cached and session.tools.variant != "cuda":
        session.warn(
            f"{', '.join(m.name for m in cached)}: less than twice the CPU's last cache "
            f"({human_bytes(memory.last_level_cache())}), which may serve a part of the reads: the "
            "share of the memory bandwidth is an upper bound"
        )
    session.results.complete = not session.results.failures
    session.save()
    if session.config.report:
        from llamacpp_bench.show.write import write_reports  # matplotlib only where it is needed

        write_reports(session.results, session.out)
    return session.results
