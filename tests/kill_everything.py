"""Stop every command by every signal at random moments; print what it leaves, and whether it ends
in the same bytes when it is run again.

    python tests/kill_everything.py --rounds 20
    python tests/kill_everything.py --rounds 3 --commands pt2-refine,pt2-bench --signals KILL

One round is one run of a command, stopped at a random moment, and one that finishes what it left.
SIGINT, SIGTERM and SIGHUP must end it in one line with exit code 128 + n and leave nothing but what
--resume takes up; after SIGKILL nothing may be left once the next run has ended. No process may go
on in either case. The runs are forks of this process, so that what is stopped is a command at work
and not the import of torch; their models are tiny and random, and llama.cpp's programs are played
by scripts, except for pt2-export, which takes the real converter. Exits with 0 if all is well.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bench_support import TENSORS, fake_tools, write_gguf
from pt2_llama_support import stand_in_places
from quantize_support import tiny_model, token_file

from pt2_core.artifact.proof_text import PROSE

MARK = "PT2_KILL_EVERYTHING"  # in the environment of every program that a run starts
SIGNALS = {n: getattr(signal, f"SIG{n}") for n in ("INT", "TERM", "HUP", "KILL")}
END_SECONDS = 60.0


@dataclass
class Command:
    """One command on its input.

    Attributes:
        name: as in its messages.
        main: the entry point.
        argv: its arguments; resume: those that take a stopped run up again.
        outputs: files and folders below the work folder that it writes.
        may_differ: names in them that are no part of the result.
        before: makes the outputs as they are before a run (None: they are not there).
    """

    name: str
    main: Callable[[list[str]], int]
    argv: list[str]
    outputs: list[Path]
    resume: list[str] = field(default_factory=list)
    may_differ: tuple[str, ...] = ("run.json",)
    before: Callable[[], None] | None = None


@dataclass
class Tally:
    """What was seen in the rounds of one command and one signal."""

    stopped: int = 0
    finished: int = 0
    leftovers: int = 0
    orphans: int = 0
    same: int = 0
    faults: list[str] = field(default_factory=list)


def start(command: Command, argv: list[str], log: Path, mark: str) -> int:
    """Fork a run with its output in ``log``; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        for number in SIGNALS.values():
            if number != signal.SIGKILL:
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ[MARK] = mark
        sys.argv = [command.name, *argv]
        code = command.main(argv)
        sys.stdout.flush()
        os._exit(code)
    except SystemExit as e:
        os._exit(e.code if isinstance(e.code, int) else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


def wait(pid: int, seconds: float = END_SECONDS) -> int | None:
    """The exit code of a run; None if it has not ended in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def marked(mark: str) -> list[int]:
    """Processes that a run has started."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            text = environ.read_bytes()
            state = environ.with_name("stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            continue
        if f"{MARK}={mark}".encode() in text and state != "Z":
            found.append(int(environ.parent.name))
    return found


def orphans(mark: str) -> list[int]:
    """Those that are still there after a moment; they are killed."""
    end = time.monotonic() + 3.0
    while (found := marked(mark)) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return found


def leftovers(root: Path) -> list[str]:
    """Temporary files, folders and locks below a folder."""
    hidden = [p for p in root.rglob(".*") if p.name != ".pt2-overlay.json"]
    return sorted(str(p.relative_to(root)) for p in hidden)


def content(command: Command) -> dict[str, bytes]:
    """All bytes that a command has written."""
    found = {}
    for output in command.outputs:
        for path in [output, *sorted(output.rglob("*"))] if output.is_dir() else [output]:
            if path.suffix == ".log" or path.name in command.may_differ:
                continue
            if path.is_file():
                found[f"{output.name}/{path.relative_to(output)}"] = path.read_bytes()
    return found


def clear(command: Command) -> None:
    for output in command.outputs:
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    if command.before is not None:
        command.before()


def run_round(
    command: Command, number: signal.Signals, delay: float, work: Path, want: dict[str, bytes],
    tally: Tally,
) -> None:  # fmt: skip
    """One stopped run and one that finishes it."""
    clear(command)
    log, mark = work.parent / "log", f"{os.getpid()}-{random.random()}"
    pid = start(command, command.argv, log, mark)
    code = wait(pid, delay)
    if code is None:
        os.kill(pid, number)
        code = wait(pid)
    where = f"SIG{number.name.removeprefix('SIG')} after {delay:.2f} s"
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tally.faults.append(f"{where}: does not end")
    elif code == 0:
        tally.finished += 1
    else:
        tally.stopped += 1
        text = log.read_text(errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        if number == signal.SIGKILL:
            good = code == -number
        else:
            good = code == 128 + number and sum("interrupted by" in line for line in lines) == 1
        if not good or "Traceback" in text or "Exception ignored" in text:
            tally.faults.append(f"{where}: exit code {code}: {text[-600:]}")
        if number != signal.SIGKILL and (left := leftovers(work)):
            tally.leftovers += 1
            tally.faults.append(f"{where}: left {left}")
    if left_running := orphans(mark):
        tally.orphans += 1
        tally.faults.append(f"{where}: {len(left_running)} processes go on")
    again = command.resume if command.resume and can_resume(command) else command.argv
    if code == 0 and not command.resume:
        clear(command)
    code = wait(start(command, again, log, mark))
    if code:
        tally.faults.append(f"{where}: then {' '.join(again)}: {log.read_text()[-600:]}")
    if left := leftovers(work):
        tally.leftovers += 1
        tally.faults.append(f"{where}: the next run left {left}")
    got = content(command)
    different = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
    if different:
        tally.faults.append(f"{where}: then other bytes in {different[:4]}")
    else:
        tally.same += 1


def can_resume(command: Command) -> bool:
    """Whether a stopped run has left something that only --resume or --overwrite may touch."""
    names = ("manifest.json", "refine-state.safetensors")
    return any(list(o.rglob(n)) for o in command.outputs if o.is_dir() for n in names)


# The commands -------------------------------------------------------------------------------------


def commands(work: Path) -> dict[str, Command]:
    """Every command on a tiny model below ``work``."""
    from export_support import model_maker

    from export.cli import main as export_main
    from pt2_eval.cli import main as eval_main
    from pt2_llama import api
    from quantize import ablate, evaluate, sensitivities
    from quantize.cli import main as quantize_main
    from quantize.refinement import selftext
    from quantize.refinement.cli import main as refine_main

    model = str(tiny_model(work / "model", num_hidden_layers=2))
    text = token_file(work / "tokens.safetensors", 10)
    calibration = ["--calibration", text, "--samples", "4", "--seqlen", "24"]
    torch_options = ["--device", "cpu", "--dtype", "float32", "--threads", "1"]
    source, out = work / "source", work / "out"
    steps = ["--steps", "8", "--batch-size", "2", "--micro-batch", "2", "--seqlen", "24",
             "--held-out", "2", "--eval-every", "2", "--save-every", "2"]  # fmt: skip
    quantize_argv = [model, "-o", str(out), *calibration, *torch_options, "-q"]
    long = token_file(work / "long.safetensors", 40)
    refined = [*quantize_argv, "--recipe", "refined", "--refine-steps", "3", "--refine-text", long]
    refine_argv = [str(source), "-o", str(out), "--text", text, *steps, *torch_options, "-q"]
    if quantize_main([model, "-o", str(source), *calibration, *torch_options, "-q"]):
        raise SystemExit("pt2-quantize fails")
    measured = work / "measured"
    (work / "export").mkdir()
    model_of_export, artifact = model_maker(lambda name: work / "export")()

    def copy_source() -> None:
        shutil.copytree(source, measured)

    made = [
        Command("pt2-quantize", quantize_main, quantize_argv, [out], [*quantize_argv, "--resume"]),
        Command("pt2-refine", refine_main, refine_argv, [out], [*refine_argv, "--resume"]),
        Command("refined", quantize_main, refined, [out], [*refined, "--resume"]),
        Command(
            "quantize.sensitivities", sensitivities.main,
            [str(measured), "--calibration", text, "--windows", "2", "--seqlen", "24",
             *torch_options],
            [measured], before=copy_source,
        ),
        Command(
            "quantize.evaluate", evaluate.main,
            [model, "--artifact", str(source), "--text", text, "--ctx", "24", *torch_options], [],
        ),
        Command(
            "quantize.ablate", ablate.main,
            [model, "-o", str(out), *calibration, "--text", text, "--ctx", "24", "--only",
             "fp,default", *torch_options],
            [out],
            may_differ=("ablation.json", "ablation.md"),  # they hold times
        ),
        Command(
            "quantize.refinement.selftext", selftext.main,
            [model, "-o", str(work / "own.safetensors"), "--tokens", "600", "--length", "60",
             "--batch", "2", "--device", "cpu"],
            [work / "own.safetensors"],
        ),
        Command(
            "pt2-eval", eval_main,
            [str(model_of_export), "--text", str(work / "text.txt"), "--ctx", "32", "-o", str(out),
             *torch_options, "-q"],
            [out],
        ),
        bench_command(work),
        build_command(work),
    ]  # fmt: skip
    if api.find_build() is not None:
        made.append(export_command(work, export_main, model_of_export, artifact))
    return {c.name: c for c in made}


def export_command(
    work: Path, main: Callable[[list[str]], int], model: Path, artifact: Path
) -> Command:
    """pt2-export with llama.cpp's own converter."""
    out = work / "model.gguf"
    argv = [str(out), "--from", str(artifact), "--model", str(model)]
    return Command("pt2-export", main, argv, [out])


def bench_command(work: Path) -> Command:
    """pt2-bench on programs that are scripts; llama-quantize takes its time."""
    from llamacpp_bench.cli import main

    bin_dir = fake_tools(work / "bin")
    tool = bin_dir / "llama-quantize"
    slow = "Path(target).write_bytes(bytes(99)); time.sleep(0.3); Path(target).write_bytes"
    tool.write_text(tool.read_text().replace("Path(target).write_bytes", slow))
    words = random.Random(0).choices(PROSE.split(), k=300)
    (work / "text.txt").write_text(" ".join(words))
    write_gguf(work / "fast.gguf")
    write_gguf(work / "full.gguf",
               [(n, s, "F16" if len(s) > 1 else "F32") for n, s, _ in TENSORS])  # fmt: skip
    cache, out = work / "cache", work / "bench"
    argv = [str(work / "fast.gguf"), "--source", str(work / "full.gguf"), "--bin", str(bin_dir),
            "--no-perplexity", "--bandwidth", "1", "-r", "1", "-t", "1", "--no-report", "--quiet",
            "--out", str(out)]  # fmt: skip

    def run(args: list[str]) -> int:
        os.environ["PT2_CACHE"] = str(cache)
        return main(args)

    return Command("pt2-bench", run, argv, [cache, out], may_differ=("results.json",))


def build_command(work: Path) -> Command:
    """pt2-llama build with a cmake that is a script and a source of three files."""
    from pt2_llama import api, cli, pinned, toolchain

    folder = work / "llama"
    folder.mkdir()
    before = dict(os.environ)
    patch = pytest.MonkeyPatch()
    places = stand_in_places(folder, patch)
    env, digests = dict(os.environ), pinned.TREE_SHA256
    patch.undo()
    os.environ.clear()
    os.environ.update(before)
    cmake = folder / "programs" / "cmake"
    cmake.write_text(cmake.read_text().replace("\ni=0\n", "\nsleep 0.3\ni=0\n"))

    def run(args: list[str]) -> int:
        os.environ.update(env)
        os.environ.pop("MODE", None)
        pinned.TREE_SHA256 = digests
        toolchain.gpus = list  # type: ignore[assignment]
        api.places = cli.places = lambda: places  # type: ignore[assignment]
        return cli.main(args)

    names = ("stamp.json",)
    return Command("pt2-llama", run, ["build", "--no-wait"], [places.builds, places.objects],
                   may_differ=names)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each command and signal (3)")
    parser.add_argument("--commands", help="names with commas between them (all)")
    parser.add_argument("--signals", default=",".join(SIGNALS), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-going", action="store_true", help="show all faults, not the first")
    args = parser.parse_args()
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  once, before the forks

    torch.set_num_threads(1)  # OpenMP's threads would not survive the fork
    rng = random.Random(args.seed)
    faults = 0
    print(f"{'command':20} {'signal':7} {'n':>3} {'stopped':>8} {'leftovers':>10} {'orphans':>8} "
          f"{'same bytes':>11}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pt2-kill-") as folder:
        work = Path(folder, "work")
        work.mkdir()
        known = commands(work)
        for name in args.commands.split(",") if args.commands else known:
            command = known[name]
            log = work.parent / "log"
            clear(command)
            began = time.monotonic()
            if wait(start(command, command.argv, log, "first"), 300.0) != 0:
                print(f"{name} fails:\n{log.read_text()}", file=sys.stderr)
                return 1
            duration, want = time.monotonic() - began, content(command)
            for label in args.signals.split(","):
                tally = Tally()
                for _ in range(args.rounds):
                    delay = rng.uniform(0, 0.95 * duration)
                    run_round(command, SIGNALS[label], delay, work, want, tally)
                print(f"{name:20} {label:7} {args.rounds:>3} {tally.stopped:>8} "
                      f"{tally.leftovers:>10} {tally.orphans:>8} "
                      f"{tally.same:>7}/{args.rounds}", flush=True)  # fmt: skip
                faults += len(tally.faults)
                for fault in tally.faults if args.keep_going else tally.faults[:1]:
                    print(f"  {fault}", file=sys.stderr, flush=True)
            clear(command)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
