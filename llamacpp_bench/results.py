"""The results: what is kept, how it is summed up, and the JSON it is written to and read from."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pt2_core.errors import PT2Error
from pt2_core.files import read_json, write_json
from pt2_core.schema import (
    boolean,
    integer,
    number,
    of,
    optional,
    record,
    sequence,
    shown,
    text,
    validate,
)
from pt2_core.texts.tokens import OLD_NAMES

SCHEMA = "pt2-bench"
SCHEMA_VERSION = 1


@dataclass
class Sample:
    """One timed test of one round: `tokens_per_second` of `test` (pp128, tg256, pp128+tg256)."""

    model: str
    test: str
    round: int
    tokens_per_second: float


@dataclass
class Perplexity:
    """`ppl` with its standard error (None where unknown), over `tokens` scored tokens."""

    protocol: str
    ppl: float
    error: float | None
    context: int
    chunks: int
    tokens: int
    note: str = ""


@dataclass
class Placement:
    """Where the operations on the weights ran.

    `ops`: per tensor type, per operation, per backend, how many tensors. `repacked`: per tensor
    type, the packed layout the CPU backend turned it into and how many tensors. `kernels`: per
    ternary type multiplied on the CPU, the path of its kernels. `elsewhere`: in a GPU run, the
    operations that landed on the CPU, by name, without those that llama.cpp always runs there (the
    look-up of the token embeddings), which are in `expected`.
    """

    ops: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    repacked: dict[str, dict[str, int]] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)


@dataclass
class Model:
    """One file of the comparison.

    `origin`: how it came to be (given, made by llama-quantize, synthetic). `bpw`: bits of the file
    over parameters. `decode_bytes`: weights that one decoded token reads, as the file has them;
    `device_bytes`: the same as the GPU has them, which is more where a type is kept in a wider form
    there (0: not known, or no GPU); `kv_bytes`: KV cache per token of context. `group`: the shape
    in synthetic runs, "" otherwise. `peak_rss` in bytes, `buffers` in MiB as llama.cpp says.
    """

    name: str
    file: str
    origin: str
    file_bytes: int
    sha256: str
    parameters: int
    bpw: float
    main_type: str
    types: dict[str, dict[str, int]]
    decode_bytes: int
    kv_bytes: int = 0
    device_bytes: int = 0
    group: str = ""
    peak_rss: int = 0
    buffers: dict[str, float] = field(default_factory=dict)
    placement: Placement = field(default_factory=Placement)
    perplexity: list[Perplexity] = field(default_factory=list)


@dataclass
class Results:
    """Everything of one run of pt2-bench.

    `failures`: models that were left out because a program failed on them, and why. `complete` is
    False while the run is still going on, and after one with failures.
    """

    machine: dict[str, Any]
    build: dict[str, Any]
    config: dict[str, Any]
    models: list[Model] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    baseline: dict[str, str] = field(default_factory=dict)
    bandwidth: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def synthetic(self) -> bool:
        return bool(self.config.get("synthetic"))

    def tests(self) -> list[str]:
        """The tests in the order in which they were first run."""
        return list(dict.fromkeys(s.test for s in self.samples))

    def groups(self) -> list[str]:
        return list(dict.fromkeys(m.group for m in self.models))

    def values(self, model: str, test: str) -> list[float]:
        """Tokens per second of a model in a test, by round."""
        found = self.by_round(model, test)
        return [found[r] for r in sorted(found)]

    def by_round(self, model: str, test: str) -> dict[int, float]:
        """Round -> tokens per second of a model in a test."""
        wanted = (s for s in self.samples if s.model == model and s.test == test)
        return {s.round: s.tokens_per_second for s in wanted}

    def summary(self, model: str, test: str) -> Summary:
        return summarise(self.values(model, test))

    def ratio(self, model: Model, test: str) -> Ratio | None:
        """Speed relative to the group's baseline; None for want of a baseline or of samples."""
        base = self.baseline.get(model.group)
        if base is None:
            return None
        mine, theirs = self.by_round(model.name, test), self.by_round(base, test)
        both = sorted(mine.keys() & theirs.keys())
        return paired_ratio([mine[r] for r in both], [theirs[r] for r in both])

    def bandwidth_share(self, model: Model, test: str) -> float | None:
        """Share of the measured memory bandwidth that a pure decode test reaches, else None."""
        rate = float(self.bandwidth.get("bytes_per_second", 0.0))
        values = self.values(model.name, test)
        read = token_bytes(model, test)
        if not (rate and values and read):
            return None
        return statistics.mean(values) * read / rate

    def save(self, path: Path) -> None:
        """Write the JSON file (atomic), with the figures that follow from the samples."""
        write_json(path, to_json(self))


_DECODE = re.compile(r"tg(\d+)(?:@d(\d+))?")  # not in batches: those read weights once for all


def token_bytes(model: Model, test: str) -> float:
    """Bytes that a decoded token of a pure decode test reads: weights and the mean KV cache.

    0 for tests that are not pure decode. Weights count as they lie in the memory that
    they are read from.
    """
    match = _DECODE.fullmatch(test)
    if match is None:
        return 0.0
    depth = int(match[1]) / 2 + int(match[2] or 0)
    return max(model.decode_bytes, model.device_bytes) + depth * model.kv_bytes


@dataclass(frozen=True)
class Summary:
    """Of n values: mean, sample standard deviation (0 for n < 2), median, least and greatest."""

    n: int
    mean: float
    stdev: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """Median over rounds of value / baseline, and the standard deviation of these ratios."""

    median: float
    stdev: float


def summarise(values: Sequence[float]) -> Summary:
    """Sum up tokens per second.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values to sum up")
    stdev = statistics.stdev(values) if len(values) > 1 else 0.0
    middle = statistics.median(values)
    return Summary(len(values), statistics.mean(values), stdev, middle, min(values), max(values))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio | None:
    """Ratios round by round, so that what slows a whole round slows both sides of its ratio.

    Rounds which one of the two lacks are left out; None when no round is left.
    """
    ratios = [a / b for a, b in zip(values, base, strict=False) if b > 0]
    if not ratios:
        return None
    return Ratio(statistics.median(ratios), statistics.stdev(ratios) if len(ratios) > 1 else 0.0)


def to_json(results: Results) -> dict[str, Any]:
    """The JSON form: the fields of :class:`Results`, the schema, and a derived `summary`."""
    rows = []
    for model in results.models:
        for test in results.tests():
            if results.values(model.name, test):
                rows.append(_summary_row(results, model, test))
    return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "summary": rows, **asdict(results)}


def _summary_row(results: Results, model: Model, test: str) -> dict[str, Any]:
    ratio = results.ratio(model, test)
    return {
        "model": model.name,
        "test": test,
        **asdict(results.summary(model.name, test)),
        "ratio": None if ratio is None else ratio.median,
        "ratio_stdev": None if ratio is None else ratio.stdev,
        "bytes_per_token": token_bytes(model, test) or None,
        "bandwidth_share": results.bandwidth_share(model, test),
    }


def load_results(path: str | Path) -> Results:
    """Read a results file.

    Raises:
        PT2Error: missing, not JSON, not from pt2-bench, of a schema version that is not known,
            with an entry missing or wrong (its place is named), or of models that it does not list.
    """
    raw = read_json(path, unique=True)
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        raise PT2Error(f"{path} is not a results file of pt2-bench (give a results.json)")
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise PT2Error(
            f"{path} has schema version {shown(raw.get('schema_version'))}, this pt2-bench knows "
            f"{SCHEMA_VERSION}; use the version that wrote it or measure again"
        )
    validate(raw, _check_file, path, MEND)
    results = _from_json(raw)
    if problem := _disagreement(results):
        raise PT2Error(f"{path} is damaged: {problem}; {MEND}")
    return results


MEND = "measure again"
_COUNT = integer(0)
# What report, merge and compare use of the parts that are free objects in the dataclass.
_MACHINE = record(
    {"cpu": text(), "cores": _COUNT, "ram_bytes": _COUNT, "system": text(), "date": text()},
    {"gpus": sequence(text())},
)
_BUILD = record(
    {"description": text()},
    {k: optional(text()) for k in ("variant", "build_commit", "backends")},
)
_CONFIG = record(
    {"threads": _COUNT, "rounds": _COUNT},
    {"repeats": _COUNT, "repeats_least": _COUNT, "repack": boolean, "text": optional(text()),
     "chunks": optional(_COUNT), "text_sha256": optional(text()), "synthetic": optional(text())},
)  # fmt: skip
_BANDWIDTH = record({}, {"bytes_per_second": number(0, 1e18), "method": text()})
_SAMPLE = record(
    {
        "model": text(),
        "test": text(r"(pp\d{1,9}(\+tg\d{1,9})?|tg\d{1,9})(@[bd]\d{1,9})?"),
        "round": integer(0, 1 << 31),
        "tokens_per_second": number(0, 1e15),
    }
)
_RANGES = record(
    {"file_bytes": _COUNT, "parameters": integer(1), "bpw": number(0, 1e6),
     "decode_bytes": _COUNT},
    {"kv_bytes": _COUNT, "device_bytes": _COUNT, "peak_rss": _COUNT},
)  # fmt: skip


def _check_file(raw: Any, where: str) -> None:
    """The dataclasses' types, and what is more narrow than these."""
    of(Results)(raw, where)
    samples = sequence(_SAMPLE)
    record(
        {"machine": _MACHINE, "build": _BUILD, "config": _CONFIG, "samples": samples,
         "models": sequence(_RANGES)},
        {"bandwidth": _BANDWIDTH},
    )(raw, where)  # fmt: skip


def _disagreement(results: Results) -> str | None:
    """What a results file says of models that it does not list, or None."""
    group_of = {m.name: m.group for m in results.models}
    if len(group_of) < len(results.models):
        return "two models have one name"
    if lost := next((s for s in results.samples if s.model not in group_of), None):
        return f"it has samples of {shown(lost.model)}, a model that it does not list"
    for group, name in results.baseline.items():
        if group_of.get(name) != group:
            return f"the baseline {shown(name)} is no model of the group {shown(group)}"
    if results.bandwidth.get("bytes_per_second") and "method" not in results.bandwidth:
        return "it does not say how the memory's bandwidth was measured"
    rounds = {(s.model, s.test, s.round) for s in results.samples}
    return "a round is there twice" if len(rounds) < len(results.samples) else None


def _pick(cls: type, raw: dict[str, Any], leave: Iterable[str] = ()) -> dict[str, Any]:
    names = {f.name for f in fields(cls)} - set(leave)
    return {k: v for k, v in raw.items() if k in names}


def _perplexity(raw: dict[str, Any]) -> Perplexity:
    found = Perplexity(**_pick(Perplexity, raw))
    return replace(found, protocol=OLD_NAMES.get(found.protocol, found.protocol))


def _from_json(raw: dict[str, Any]) -> Results:
    models = []
    for m in raw["models"]:
        models.append(
            Model(
                **_pick(Model, m, ("placement", "perplexity")),
                placement=Placement(**_pick(Placement, m.get("placement", {}))),
                perplexity=[_perplexity(p) for p in m.get("perplexity", [])],
            )
        )
    samples = [Sample(**_pick(Sample, s)) for s in raw["samples"]]
    rest = _pick(Results, raw, ("models", "samples"))
    return Results(**rest, models=models, samples=samples)
