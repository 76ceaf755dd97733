"""The smoke test at the end of a build: a tiny model, quantised and evaluated in every type.

It asks whether the built programs run on this machine and compute something sane; whether the
arithmetic is right is for test-quantize-fns, test-backend-ops and our own tests.
"""

from __future__ import annotations

import math
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.process import children
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import open_reporter
from pt2_llama.perplexity import final_perplexity, until_told
from pt2_llama.tiny_model import tiny_text, write_tiny_model

STOCK_TYPES: tuple[str, ...] = ("F16", "Q8_0", "Q4_0", "Q6_K", "Q4_K", "Q2_K", "TQ1_0", "TQ2_0")
OUR_TYPES: tuple[str, ...] = formats.NAMES
# Random weights put the perplexity near the vocabulary's 320; a wrong kernel gives inf, nan or
# thousands. Two bits of random weights change it, by less than this factor.
MAX_RATIO = 4.0
TIMEOUT_S = 120

Runner = Callable[[Sequence[str], Mapping[str, str]], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status (negative: the signal that killed it) and its output."""

    status: int
    output: str


@dataclass(frozen=True)
class Failure:
    """What failed in the smoke test.

    Attributes:
        what: the type and the program.
        reason: the signal, exit status or figure.
        crashed: whether the processor stopped the program (not: it ended with an error).
    """

    what: str
    reason: str
    crashed: bool
    output: str = ""


def run_program(command: Sequence[str], env: Mapping[str, str]) -> Outcome:
    """The real runner: run to the end, at most two minutes."""
    try:
        done = children.run(command, env=env, timeout=TIMEOUT_S, merge=True)
    except children.TimeoutExpired as e:
        return Outcome(124, f"no end after {e.timeout:.0f} s")
    return Outcome(done.returncode, done.stdout)


def crash_signal(status: int) -> str | None:
    """Name of the signal by which the processor or kernel stopped a program, or None.

    SIGILL, SIGSEGV, SIGBUS and SIGFPE: what an instruction that the machine cannot run ends in.
    A shell's 128 + number counts too.
    """
    number = -status if status < 0 else status - 128
    faults = {signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE}
    return signal.Signals(number).name if number in faults else None


def smoke_test(
    bin_dir: Path,
    env: Mapping[str, str],
    types: Sequence[str],
    gpu: bool = False,
    runner: Runner = run_program,
) -> tuple[dict[str, float], Failure | None]:
    """Quantise the tiny model to each type and evaluate it.

    Args:
        bin_dir: folder with llama-quantize and llama-perplexity.
        types: F16 first; the others are compared with it.
        gpu: also evaluate with all layers on the GPU (the other runs see no GPU).
        runner: runs a command (tests put their own in).

    Returns:
        Perplexity per type (``"F16 gpu"`` for the GPU's), and the first failure or None.
    """
    results: dict[str, float] = {}
    reporter = open_reporter()
    with (
        temporary_folder(Path(tempfile.gettempdir()), "pt2-smoke-") as folder,
        reporter.phase("smoke test", len(types), "types") as bar,
    ):
        base = write_tiny_model(folder / "F16.gguf")
        text = folder / "text.txt"
        text.write_text(tiny_text())
        for done, kind in enumerate(types):
            bar.reach(done, kind)
            model = folder / f"{kind}.gguf"
            if kind != "F16":
                quantize = str(bin_dir / "llama-quantize")
                command = [quantize, "--pure", str(base), str(model), kind, "1"]
                if failure := _judge(f"llama-quantize to {kind}", runner(command, env)):
                    return results, failure
            for device in ("cpu", "gpu") if gpu else ("cpu",):
                label = kind if device == "cpu" else f"{kind} gpu"
                command = _perplexity(bin_dir, model, text, device)
                # By default llama.cpp takes every GPU it sees, and the CPU would go untested.
                seen = {**env, "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else env
                outcome = until_told(partial(runner, command, seen), _told)
                if failure := _judge(f"llama-perplexity of {label}", outcome):
                    return results, failure
                value = final_perplexity(outcome.output)
                if failure := _sane(label, value, results.get("F16"), outcome):
                    return results, failure
                assert value is not None
                results[label] = value
            if kind != "F16":
                model.unlink(missing_ok=True)
    return results, None


def _told(outcome: Outcome) -> bool:
    return outcome.status != 0 or final_perplexity(outcome.output) is not None


def _perplexity(bin_dir: Path, model: Path, text: Path, device: str) -> list[str]:
    tool = str(bin_dir / "llama-perplexity")
    command = [tool, "-m", str(model), "-f", str(text), "-c", "64", "-t", "1"]
    return [*command, "-ngl", "99"] if device == "gpu" else command


def _judge(what: str, outcome: Outcome) -> Failure | None:
    if outcome.status == 0:
        return None
    if name := crash_signal(outcome.status):
        return Failure(what, f"stopped by {name}", True, outcome.output)
    return Failure(what, f"exit status {outcome.status}", False, outcome.output)


def _sane(label: str, value: float | None, base: float | None, outcome: Outcome) -> Failure | None:
    what = f"llama-perplexity of {label}"
    if value is None:
        return Failure(what, "printed no perplexity", False, outcome.output)
    if not math.isfinite(value) or value < 1:
        return Failure(what, f"perplexity {value}", False, outcome.output)
    if base is not None and not 1 / MAX_RATIO < value / base < MAX_RATIO:
        return Failure(
            what, f"perplexity {value:.1f} where F16 has {base:.1f}", False, outcome.output
        )
    return None


def build_until_it_runs(
    compile_with: Callable[[bool], None],
    test: Callable[[], Failure | None],
    amx: bool,
    tell: Callable[[str], None],
) -> bool:
    """Compile and smoke-test; when AMX seems to be what crashes, once more without it.

    Some virtual machines show AMX in their CPU flags and fault on its first instruction.

    Args:
        compile_with: compiles with (True) or without (False) AMX.
        test: the smoke test on what was compiled.
        amx: whether a native build would use AMX here.
        tell: gets one line for the user.

    Returns:
        Whether the final build uses AMX.

    Raises:
        PT2Error: the smoke test fails in a way that leaving out AMX does not mend.
    """
    compile_with(amx)
    failure = test()
    if failure is not None and failure.crashed and amx:
        tell(
            f"smoke test: {failure.what} was {failure.reason}; this CPU shows AMX, which some "
            "virtual machines cannot run: building again without AMX"
        )
        amx = False
        compile_with(amx)
        failure = test()
    if failure is not None:
        raise PT2Error(f"smoke test failed: {failure.what}: {failure.reason}")
    return amx
