"""llama-perplexity and its lost line: the one place that knows of it.

The pinned llama.cpp's tools hand their output to a thread for logging, and llama-perplexity and
llama-batched-bench can exit (with status 0) before that thread has written the last lines: seen in
about one run of twenty on a loaded machine. Whoever reads those lines runs them from here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pt2_core.errors import PT2Error
from pt2_core.process import children

T = TypeVar("T")

TOOL = "llama-perplexity"
# A loaded machine loses the line in one run of twenty: five losses in a row are one in millions.
TRIES = 5

_FINAL = re.compile(r"Final estimate: PPL\s*=\s*([-+.\deE]+|nan|-?inf)")
_COMPARED = re.compile(r"Mean\s+KLD\s*:\s*[-+.\deE]+")


@dataclass(frozen=True)
class Told:
    """What a run of llama-perplexity told.

    Attributes:
        output: all that it wrote, stderr in stdout.
        value: its ``Final estimate``; None of a run with ``--kl-divergence``, which has none.
    """

    output: str
    value: float | None

    def perplexity(self) -> float:
        """The perplexity.

        Raises:
            PT2Error: the run was a comparison.
        """
        if self.value is None:
            raise PT2Error(f"{TOOL} compared predictions and printed no perplexity")
        return self.value


def until_told(run: Callable[[], T], told: Callable[[T], bool]) -> T:
    """Call ``run`` until ``told`` says that nothing is missing, at most TRIES times.

    Returns:
        The last result; ``told`` may say no of it too.
    """
    result = run()
    for _ in range(TRIES - 1):
        if told(result):
            break
        result = run()
    return result


def final_perplexity(output: str) -> float | None:
    """The figure of llama-perplexity's ``Final estimate: PPL = 12.3``; None when there is none."""
    match = _FINAL.search(output)
    return float(match.group(1)) if match else None


def is_whole(output: str) -> bool:
    """Whether llama-perplexity has written its last lines: a final estimate or a comparison."""
    return final_perplexity(output) is not None or _COMPARED.search(output) is not None


def run_perplexity(
    command: Sequence[str | Path], env: Mapping[str, str], timeout: float | None = None
) -> Told:
    """Run a command of llama-perplexity, again while its last lines are lost.

    Args:
        env: the whole environment of the program.
        timeout: seconds for each run (None: as long as it takes).

    Raises:
        PT2Error: it cannot be started, fails, takes too long, or lost its last lines TRIES times.
    """

    def once() -> str:
        try:
            done = children.run(command, env=env, timeout=timeout, merge=True)
        except children.TimeoutExpired as e:
            raise PT2Error(f"{TOOL} was stopped after {e.timeout:g} s") from e
        except OSError as e:
            raise PT2Error(f"cannot start {TOOL}: {e.strerror}; run: pt2-llama doctor") from e
        if done.returncode != 0:
            last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
            raise PT2Error(f"{TOOL} failed (exit {done.returncode}): {last[:300]}")
        return done.stdout

    output = until_told(once, is_whole)
    if not is_whole(output):
        raise PT2Error(f"{TOOL} lost its last lines {TRIES} times")
    return Told(output, final_perplexity(output))
