"""Progress: a bar whose times are never cut, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from pt2_core import progress
from pt2_core.progress import (
    LineReporter,
    Phase,
    QuietReporter,
    Reporter,
    TerminalReporter,
    bar_line,
    plain_line,
)

ROOT = Path(__file__).parents[1]
LONG = "block 12/80  E_x q 0.123 k 0.234 v 0.345 o 0.456 gate 0.567 up 0.678 down 0.789"
TIMES = re.compile(r"elapsed 1:00:00  left (\d+:\d\d:\d\d)$")


@pytest.fixture
def now(monkeypatch):
    """A clock that is set by hand."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("text", ["", "block 1/2", LONG, "文字" * 40, "a\nb\x1b[31m"])
@pytest.mark.parametrize("unit", [None, "steps"])
def test_the_times_are_never_cut_on_a_narrow_terminal(width, text, unit):
    phase = Phase("ternarising", 400, unit, began=0, moved=3600, done=1, text=text)
    line = bar_line(phase, 3600, width)
    assert cell_len(line) <= width and line.isprintable()
    assert TIMES.search(line) and TIMES.search(line)[1] == "399:00:00"
    assert line.startswith("ternar") and "0%" in line and (unit is None or "1/400 steps" in line)


def test_the_bar_shrinks_before_the_description_and_goes_last_of_the_two():
    phase = Phase("ternarising", 4, began=0, moved=60, done=2, text="block 2/4")
    wide, narrow, tiny = (bar_line(phase, 60, w) for w in (100, 72, 40))
    assert wide.count("━") == wide.count("─") == 12 and "block 2/4" in wide
    assert 8 <= narrow.count("━") + narrow.count("─") < 24 and "block 2/4" in narrow
    assert "━" not in tiny and tiny.endswith("elapsed 1:00  left 1:00")
    assert bar_line(phase, 60, 12) == "1:00 1:00"


@pytest.mark.parametrize("width", [80, 60])
def test_a_terminal_shows_a_bar_with_both_times(width, now):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, color_system=None)
    with TerminalReporter(console) as reporter:
        reporter.start("ternarising", 48)
        now[0] += 30
        reporter.step(LONG, 12)
        reporter._live.refresh()
        reporter.warn("[not] markup, [b]x[/b] :smile:")
    shown = screen.getvalue()
    assert "elapsed 0:30  left 1:30" in shown and "━" in shown and "25%" in shown
    assert "warning: [not] markup, [b]x[/b] :smile:" in shown and len(reporter.warnings) == 1
    assert "\x1b[?25h" in shown  # the cursor is there again


def test_names_in_the_bar_are_no_markup(now):
    screen = io.StringIO()
    console = Console(file=screen, width=120, force_terminal=True, color_system=None)
    with TerminalReporter(console) as reporter:
        reporter.start("[b]x[/b]", 4)
        reporter.step("[red]y :smile:")
        reporter._live.refresh()
        reporter.note("[b]z[/b] :smile:")
    assert "[b]x[/b]  [red]y :smile:" in screen.getvalue()
    assert "[b]z[/b] :smile:" in screen.getvalue()


def test_a_log_gets_plain_lines_with_the_time_left(now):
    log = io.StringIO()
    reporter = LineReporter(log)
    reporter.start("ternarising", 48)
    for block in range(12):
        for site in ("q+k+v", "o", "gate+up", "down"):
            now[0] += 10
            reporter.step(f"block {block + 1}/12 {site}")
    reporter.done()
    lines = log.getvalue().splitlines()
    assert lines[0] == "ternarising ..." and len(lines) == 50
    assert lines[12] == "ternarising  block 3/12 down  25%  elapsed 2:00  left 6:00"
    assert lines[-1] == "ternarising  done  elapsed 8:00"


def test_a_log_gets_one_line_a_second_at_most_and_fewer_that_say_the_same(now):
    log = io.StringIO()
    reporter = LineReporter(log)
    reporter.start("fast", 1000, "steps")
    for n in range(1000):
        now[0] += 0.01
        reporter.step(f"step {n}")
    reporter.start("the same", 100)
    for _ in range(100):
        now[0] += 1
        reporter.step("a block")
    reporter.done()
    lines = log.getvalue().splitlines()
    fast = [x for x in lines if x.startswith("fast")]
    assert 9 <= len(fast) <= 13 and re.search(r" \d+/1000 steps  \d+%  elapsed", fast[5])
    assert [x.split("  ")[2] for x in lines if x.startswith("the same  a")][:3] == [
        "1%",
        "6%",
        "11%",
    ]


def test_the_time_left_counts_down_between_two_steps_and_is_unknown_at_first():
    phase = Phase("x", 10, began=0, moved=0)
    assert phase.left(5) is None and "left -:--" in plain_line(phase, 5)
    phase.done, phase.moved = 5, 100
    assert phase.left(100) == 100 and phase.left(130) == 70 and phase.left(500) == 0
    assert Phase("x", None, "files", done=7).figures(3) == "7 files  elapsed 0:03"
    assert Phase("x", 2e8, "bytes", moved=1, done=1e8).figures(1).startswith("100/200 MB  50%")


def test_stages_by_title_begin_and_end_once(now):
    log = io.StringIO()
    reporter = LineReporter(log)
    for title, done in (("one", 0), ("one", 1), ("one", 2), ("one", 2), ("two", 1), ("two", 2)):
        now[0] += 2
        reporter.stage(title, done, 2)
    lines = log.getvalue().splitlines()
    assert [x for x in lines if x.endswith("...")] == ["one ...", "two ..."]
    assert [x.split("  ")[:2] for x in lines if "done" in x] == [["one", "done"], ["two", "done"]]


def test_quiet_shows_warnings_and_nothing_else():
    log = io.StringIO()
    for reporter in (QuietReporter(log), Reporter()):
        with reporter.phase("x", 3):
            reporter.step("y")
            reporter.note("z")
        reporter.warn("look")
        assert reporter.warnings == ["look"]
    assert log.getvalue() == "warning: look\n"


def test_a_phase_that_fails_does_not_say_done(now):
    log = io.StringIO()
    reporter = LineReporter(log)
    with pytest.raises(ValueError), reporter.phase("x", 3):
        now[0] += 5
        raise ValueError
    assert "done" not in log.getvalue()


SCRIPT = """
import time
from pt2_core.progress import open_reporter
with open_reporter() as reporter:
    reporter.start("working", 4)
    for n in range(4):
        time.sleep(0.3)
        reporter.step(f"part {n + 1}/4 of something with a long name, longer than a terminal")
    time.sleep(0.3)
"""


def test_a_pipe_gets_no_escape_codes_and_a_terminal_the_whole_times():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "FORCE_COLOR": "1"}
    piped = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, stderr=subprocess.PIPE, text=True, check=True
    ).stderr
    assert "\x1b" not in piped and "\r" not in piped and "working  done  elapsed 0:01" in piped
    assert re.search(r"working  part 1/4 of .* 25%  elapsed 0:00  left 0:0", piped)
    for width in (80, 60):
        shown = on_a_terminal([sys.executable, "-c", SCRIPT], {**env, "COLUMNS": str(width)})
        drawn = [x for x in re.split(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", shown) if "elapsed" in x]
        assert drawn and all(re.search(r"elapsed 0:0\d  left [0-9-]+:[0-9-]+$", x) for x in drawn)
        assert all(len(x) <= width for x in drawn)


def on_a_terminal(command: list[str], env: dict[str, str]) -> str:
    """What a command shows on a pseudo-terminal."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(command, env=env, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # Linux' way of saying that the other end is closed
            break
        if not piece:
            break
        parts.append(piece)
    os.close(ours)
    assert child.wait() == 0
    return b"".join(parts).decode()
