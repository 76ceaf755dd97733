"""The whole run: files and baselines in, interleaved timings, perplexities, results out.

from llamacpp_bench import Config, bench
results = bench(["model.gguf"], Config(source="hf_folder", text="wiki.test.txt"))
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from llamacpp_bench import memory, speed
from llamacpp_bench.baselines import (
    FLOAT_TYPES,
    IMATRIX_ENOUGH,
    BaselineMaker,
    Wanted,
    check_name,
    find_source,
    same_model,
    source_gguf,
)
from llamacpp_bench.gguf_info import GGUFInfo, read_gguf
from llamacpp_bench.machine import describe_machine, usable_cores
from llamacpp_bench.perplexity import (
    PROTOCOLS,
    Plan,
    measure_perplexity,
    perplexity_command,
    plan,
    scored_text,
)
from llamacpp_bench.report import write_reports
from llamacpp_bench.results import Model, Results
from llamacpp_bench.runner import Load, shown_command
from llamacpp_bench.tools import ToolBox, cache_dir, open_toolbox
from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, make_folder, sha256_file
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.sources import Text, read_text, source_name

MIN_ROUNDS = 5


@dataclass(frozen=True)
class Config:
    """Every setting of a run; the command line's options have the same names.

    `baselines`: what to make or load, the first one is what ratios refer to. `text`: for the
    perplexity (None only with `perplexity` False). `text_field`: what to read of JSON records, in
    both texts. `chunks`: 512-token windows of it (None: all).
    `repeats`: passes of a test in each round. `bandwidth`: bytes per second, instead of measuring
    it; `bandwidth_program`: a program that measures it
    (:func:`llamacpp_bench.memory.measure_by_program`). `work`: where synthetic files go.

    `batch_prompt`, `batch_gen`: lengths in the tests of many sequences (None: those of `prompt` and
    `gen`). `time_limit`: seconds after which no further round of a group begins; `tool_timeout`:
    seconds after which one call of a program is stopped; `keep_going`: a model whose program fails
    is left out of the rest of the run, which then counts as not complete. `placement`: whether to
    look up where the operations of "all" files, of "ternary" ones or of "none" run. `report`: write
    tables and plots beside results.json.
    """

    baselines: tuple[Wanted, ...] = (Wanted(type="Q2_K"),)
    source: str | None = None
    imatrix_text: str | None = None
    text_field: str | None = None
    prompt: int = 128
    gen: int = 256
    pg: tuple[tuple[int, int], ...] = ((128, 256),)
    depths: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = ()
    batch_prompt: int | None = None
    batch_gen: int | None = None
    rounds: int = MIN_ROUNDS
    repeats: int = 1
    threads: int | None = None
    gpu_layers: int | None = None
    repack: bool = True
    variant: str = "cpu"
    bin_dir: str | None = None
    perplexity: bool = True
    text: str | None = None
    chunks: int | None = None
    bandwidth: float | None = None
    bandwidth_program: str | None = None
    placement: str = "all"
    time_limit: float | None = None
    tool_timeout: float | None = None
    keep_going: bool = False
    strict: bool = False
    out: str | None = None
    work: str | None = None
    report: bool = True
    keep: bool = False
    quiet: bool = False

    def load(self) -> Load:
        """What llama-bench is asked to do, the number of threads settled."""
        return Load(
            prompt=self.prompt,
            gen=self.gen,
            pg=self.pg,
            depths=self.depths,
            threads=self.threads or usable_cores(),
            gpu_layers=self.gpu_layers,
            repack=self.repack,
            batches=self.batches,
            batch_prompt=self.prompt if self.batch_prompt is None else self.batch_prompt,
            batch_gen=self.gen if self.batch_gen is None else self.batch_gen,
            repeats=self.repeats,
            timeout=self.tool_timeout,
        )


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


def bench(models: Sequence[str | Path], config: Config) -> Results:
    """Measure models against baselines, and write everything into the output folder.

    Raises:
        PT2Error: a file, an option, a tool or the machine is not fit; or `strict`, and an operation
            ran on another backend than the one that was asked for.
    """
    if not models:
        raise PT2Error("give at least one .gguf file, or --synthetic SHAPES")
    text = scored_text(config.text, config.text_field) if config.perplexity else None
    given = [read_gguf(check_name(Path(m))) for m in models]
    for wanted in config.baselines:
        if wanted.file is not None:
            check_name(wanted.file)
    if any(w.type for w in config.baselines):
        check_name(cache_dir())
    tools = open_toolbox(config.variant, config.bin_dir)
    session = start(config, tools, given[0].path.stem, text)
    for info in given:
        add_model(session, info, info.path.stem, "given")
    add_baselines(session, given)
    speed.measure_group(session, "")
    if config.perplexity:
        measure_perplexities(session)
    return finish(session)


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
    raw["threads"] = config.load().threads
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


def add_baselines(session: Session, given: list[GGUFInfo]) -> None:
    """Make or load the baselines; the first is what the ratios refer to."""
    config, show = session.config, session.show
    first: str | None = None
    maker: BaselineMaker | None = None
    for wanted in config.baselines:
        if wanted.file is not None:
            info = read_gguf(check_name(wanted.file))
            model = add_model(session, info, wanted.label, "given as baseline")
        else:
            if maker is None:
                maker = open_maker(session, given)
            path = maker.make(str(wanted.type))
            with_matrix = " with an importance matrix" if maker.imatrix_text else ""
            origin = f"llama-quantize{with_matrix} from {maker.source.path.name}"
            model = add_model(session, read_gguf(path), wanted.label, origin)
        show.note(f"baseline {model.name}: {human_bytes(model.file_bytes)}, {model.bpw:.3f} bpw")
        first = first or model.name
    session.results.baseline[""] = first or session.results.models[0].name


def open_maker(session: Session, given: list[GGUFInfo]) -> BaselineMaker:
    """The maker of baselines for the given models' common source."""
    config = session.config
    text = None
    if config.imatrix_text:
        text = read_text(config.imatrix_text, text_field=config.text_field, enough=IMATRIX_ENOUGH)
        say_notes(session, text)
        if session.text is not None and text.sha256 == session.text.sha256:
            raise PT2Error("--imatrix-text is the text that is scored; give other text instead")
    source = source_gguf(find_source(given, config.source), session.show.note, given)
    for info in given:
        same_model(info, source)
    threads = config.load().threads or 1
    return BaselineMaker(session.tools, source, text, threads, session.show.note)


def measure_perplexities(session: Session) -> None:
    """Both protocols for every model."""
    config = session.config
    assert session.text is not None
    jobs: list[tuple[Model, Plan]] = []
    for protocol in PROTOCOLS:
        for model in session.results.models:
            p = plan(protocol, session.infos[model.name], config.chunks)
            if p is None:
                session.warn(f"{model.name}: its context is below 256 tokens: no perplexity")
            else:
                jobs.append((model, p))
    for note in dict.fromkeys(f"{p.protocol} perplexity: {p.note}" for _, p in jobs if p.note):
        session.warn(note)
    load = config.load()
    with (
        session.text.as_file() as text,
        session.show.phase("perplexity", len(jobs), "runs") as show,
    ):
        for model, p in jobs:
            label = f"{p.protocol}, {model.name}"
            show.step(label, 0)
            log = session.log("perplexity", p.protocol, model.name)
            session.command(
                perplexity_command(session.tools, session.infos[model.name], text, p, load)
            )
            found = measure_perplexity(
                session.tools,
                session.infos[model.name],
                text,
                p,
                load,
                log,
                lambda n, label=label: show.step(f"{label}, window {n}", 0),  # type: ignore[misc]
            )
            model.perplexity.append(found)
            session.save()
            show.step()


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
        write_reports(session.results, session.out)
    return session.results


def synthetic_config(config: Config) -> Config:
    """Random weights have no perplexity and no baselines but each other."""
    return replace(config, perplexity=False, text=None, baselines=())
