"""What tables and figures share: names, numbers, colours, and what was measured on what."""

from __future__ import annotations

from llamacpp_bench.results import Model, Perplexity, Results
from pt2_core.files import human_bytes

# Okabe-Ito colours, which the colour-blind see apart; the baseline is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800", "#000000")
BASE_COLOUR = "#8A8A8A"


def digits(value: float) -> str:
    """A number with three or four significant digits: `12345`, `135.2`, `7.31`."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def perplexity_of(model: Model, protocol: str) -> Perplexity | None:
    return next((p for p in model.perplexity if p.protocol == protocol), None)


def protocols(results: Results) -> list[tuple[str, int]]:
    """The protocols measured, with their window lengths."""
    found = [(p.protocol, p.context) for m in results.models for p in m.perplexity]
    return list(dict.fromkeys(found))


def plain_tests(results: Results) -> list[str]:
    """The tests at depth 0 and batch 1."""
    return [t for t in results.tests() if "@" not in t]


def caption(results: Results) -> list[str]:
    """What the figures were measured on, in sentences."""
    m, c = results.machine, results.config
    gpu = f", {', '.join(m['gpus'])}" if m.get("gpus") else ""
    ram = human_bytes(m["ram_bytes"])
    lines = [f"{m['cpu']}, {m['cores']} cores, {ram} RAM{gpu}; {m['system']}; {m['date']}."]
    b = results.build
    threads = f"{c['threads']} thread{'s' if c['threads'] != 1 else ''}"
    repack = "" if c.get("repack", True) else ", no repacking"
    repeats = int(c.get("repeats", 1))
    least = int(c.get("repeats_least", repeats))
    passes = f" of {f'{least} to ' if least < repeats else ''}{repeats} passes"
    passes = passes if repeats > 1 else ""
    lines.append(
        f"llama.cpp {b.get('build_commit') or '?'} ({b['description']}, {b.get('backends') or '?'}"
        f"), {threads}{repack}, {c['rounds']} interleaved rounds{passes}."
    )
    rate = float(results.bandwidth.get("bytes_per_second", 0))
    if rate:
        method = results.bandwidth["method"]
        known = "given" if method == "given" else f"measured in this run: {method}"
        lines.append(f"Memory can be read at {rate / 1e9:.1f} GB/s ({known}).")
    if c.get("text"):
        lines.append(f"Perplexity on {c['text']}{_chunks(c.get('chunks'))}.")
    if results.synthetic:
        lines.insert(0, f"Synthetic models, {c['synthetic']}.")
    return lines


def _chunks(chunks: int | None) -> str:
    return "" if chunks is None else f", its first {chunks} windows of 512 tokens"


def test_title(test: str) -> str:
    """`pp128+tg256` -> `End to end: 128 + 256 tokens`."""
    parts = [p[2:] for p in test.split("+")]
    if len(parts) == 2:
        return f"End to end: {parts[0]} + {parts[1]} tokens"
    kind = "Prefill" if test.startswith("pp") else "Decode"
    return f"{kind}: {parts[0]} tokens"


def short_name(model: Model) -> str:
    """The name within its group: of `7b Q4_0` in group `7b` it is `Q4_0`."""
    return model.name.removeprefix(f"{model.group} ") if model.group else model.name
