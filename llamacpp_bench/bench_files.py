"""The whole run: files and baselines in, interleaved timings, perplexities, results out.

from llamacpp_bench import Config, bench
results = bench(["model.gguf"], Config(source="hf_folder", text="wiki.test.txt"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llamacpp_bench import speed
from llamacpp_bench.config import Config
from llamacpp_bench.results import Model, Results
from llamacpp_bench.run.baselines import (
    IMATRIX_ENOUGH,
    BaselineMaker,
    check_name,
    find_source,
    same_model,
    source_gguf,
)
from llamacpp_bench.run.perplexity import (
    PROTOCOLS,
    Plan,
    measure_perplexity,
    perplexity_command,
    plan,
    scored_text,
)
from llamacpp_bench.run.tools import cache_dir, open_toolbox
from llamacpp_bench.session import Session, add_model, finish, say_notes, start
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes
from pt2_core.gguf_info import GGUFInfo, read_gguf
from pt2_core.texts.sources import read_text


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
