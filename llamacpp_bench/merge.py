"""Several results files of one comparison as one: its parts were measured in runs of their own."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from llamacpp_bench.results import Model, Results
from pt2_core.errors import PT2Error

SAME_MACHINE = ("cpu", "cores", "gpus")
SAME_BUILD = ("build_commit", "variant", "backends")


def merge(parts: Sequence[Results]) -> Results:
    """One `Results` of all parts: models by name, the rounds of each test one after the other.

    What is said of the whole (machine, build, configuration, memory bandwidth) is the first part's,
    but for settings that differ: those are listed. Rounds of a test that two parts have are
    numbered on, and stay paired because a part measures all of its models in every round.

    Raises:
        PT2Error: the parts come from different machines or builds, have different baselines for a
            group, or files of one name and different sizes.
    """
    if not parts:
        raise PT2Error("nothing to merge")
    out = copy.deepcopy(parts[0])
    for part in parts[1:]:
        check_fit(out, part)
        before = rounds_so_far(out)
        known = {m.name: m for m in out.models}
        for model in part.models:
            if model.name in known:
                join(known[model.name], model)
            else:
                out.models.append(copy.deepcopy(model))
        group_of = {m.name: m.group for m in part.models}
        for sample in part.samples:
            shift = before.get((group_of[sample.model], sample.test), 0)
            out.samples.append(replace(sample, round=sample.round + shift))
        out.baseline = part.baseline | out.baseline | compared(part)
        for name in ("commands", "warnings", "failures"):
            mine, theirs = getattr(out, name), getattr(part, name)
            mine += [line for line in theirs if line not in mine]
        out.complete = out.complete and part.complete
    return settle(out, parts)


def rounds_so_far(results: Results) -> dict[tuple[str, str], int]:
    """Rounds of each (group, test), by the highest number of one."""
    group_of = {m.name: m.group for m in results.models}
    count: dict[tuple[str, str], int] = {}
    for s in results.samples:
        key = (group_of[s.model], s.test)
        count[key] = max(count.get(key, 0), s.round + 1)
    return count


def compared(part: Results) -> dict[str, str]:
    """Baselines of the groups in which something is compared; one file alone is its own."""
    sizes = Counter(m.group for m in part.models)
    return {group: base for group, base in part.baseline.items() if sizes[group] > 1}


def check_fit(a: Results, b: Results) -> None:
    """Refuse parts that are not of one comparison; see :func:`merge`."""
    for name, keys in (("machine", SAME_MACHINE), ("build", SAME_BUILD)):
        for key in keys:
            x, y = getattr(a, name).get(key), getattr(b, name).get(key)
            if x != y and None not in (x, y):
                raise PT2Error(f"the results are of different {name}s: {key} is {x} and {y}")
    for group, base in compared(b).items():
        if compared(a).get(group, base) != base:
            raise PT2Error(f"the ratios refer to {a.baseline[group]} and to {base}; measure again")


def join(mine: Model, other: Model) -> None:
    """Complete a model by what another part knows of it."""
    if (mine.file_bytes, mine.types, mine.group) != (other.file_bytes, other.types, other.group):
        raise PT2Error(f"two different files are called {mine.name}; merge runs of the same files")
    mine.peak_rss = max(mine.peak_rss, other.peak_rss)
    mine.device_bytes = max(mine.device_bytes, other.device_bytes)
    mine.buffers = mine.buffers or other.buffers
    if not mine.placement.ops:
        mine.placement = other.placement
    have = {(p.protocol, p.context) for p in mine.perplexity}
    mine.perplexity += [p for p in other.perplexity if (p.protocol, p.context) not in have]


def settle(out: Results, parts: Sequence[Results]) -> Results:
    """Put groups and rounds in order, and say in the configuration what was merged."""
    groups = out.groups()
    out.models.sort(key=lambda m: groups.index(m.group))
    repeats = sorted(int(p.config.get("repeats", 1)) for p in parts)
    out.config |= {"repeats_least": repeats[0], "repeats": repeats[-1]}
    out.config["rounds"] = max(int(p.config.get("rounds", 0)) for p in parts)
    out.config["merged"] = len(parts)
    return out
