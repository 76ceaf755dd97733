"""How commands are stopped, what they start and leave, and which folder they may write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pt2_core import words
from pt2_core.cli import check_threads, run_cli
from pt2_core.commands import resume_command
from pt2_core.errors import PT2Error, reason
from pt2_core.files import atomic_path, make_folder, read_json, write_json
from pt2_core.process import children, memory, stop
from pt2_core.process.locks import LOCK, folder_lock
from pt2_core.process.temporary import remove_dead, temporary_file, temporary_folder

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def python(program: str, *args: object, **more: object) -> subprocess.Popen[str]:
    """A Python program with signals as a terminal's programs have them."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in STOPS], **more,
    )  # fmt: skip


def wait_for(path: Path, seconds: float = 30.0) -> str:
    end = time.monotonic() + seconds
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)
    return path.read_text()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while any(is_running(p) for p in pids) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(is_running(p) for p in pids)


# Signals ------------------------------------------------------------------------------------------

AT_WORK = """
import sys, time
from pathlib import Path
from pt2_core.process import children
from pt2_core.cli import run_cli
from pt2_core.files import atomic_path
folder = Path(sys.argv[1])
def body():
    command = ["sh", "-c", "sleep 300 & echo $! > grandchild; echo $$ > child; wait"]
    with atomic_path(folder / "big.bin") as tmp:
        tmp.write_bytes(bytes(1000))
        with children.child(command, cwd=folder, tree=len(sys.argv) > 2):
            time.sleep(300)
sys.exit(run_cli("pt2-test", body, resume=lambda: "pt2-test --resume 'my model'"))
"""


@pytest.mark.parametrize("number", STOPS)
def test_every_signal_ends_a_command_in_one_line_and_leaves_nothing(number, tmp_path: Path) -> None:
    run = python(AT_WORK, tmp_path)
    child = int(wait_for(tmp_path / "child"))
    grandchild = int(wait_for(tmp_path / "grandchild"))
    for _ in range(3):  # those that come during the clean-up change nothing
        run.send_signal(number)
    out, error = run.communicate(timeout=30)
    code = 128 + number
    assert run.returncode == code and out == ""
    assert error == (
        f"pt2-test: interrupted by {number.name} (exit code {code}); go on with: "
        "pt2-test --resume 'my model'\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["child", "grandchild"]
    assert gone(child, grandchild)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("tree", [False, True])
def test_after_a_kill_no_child_goes_on_and_the_next_run_removes_what_is_left(
    tree, tmp_path: Path
) -> None:
    run = python(AT_WORK, tmp_path, *(["tree"] if tree else []))
    child = int(wait_for(tmp_path / "child"))
    grandchild = int(wait_for(tmp_path / "grandchild"))
    run.kill()
    run.wait()  # not for its output, which a grandchild that goes on keeps open
    assert gone(child, *([grandchild] if tree else []))
    if not tree:
        os.kill(grandchild, signal.SIGKILL)
    run.communicate()
    assert list(tmp_path.glob(".big.bin.*.tmp"))
    with atomic_path(tmp_path / "big.bin") as tmp:
        tmp.write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.bin", "child", "grandchild"]


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    program = """
    import os, signal, sys
    from pt2_core.cli import run_cli
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    sys.exit(run_cli("pt2-test", lambda: os.kill(os.getpid(), signal.SIGHUP)))
    """
    run = python(program)
    assert run.communicate(timeout=30) == ("", "") and run.returncode == 0


def test_a_signal_during_the_import_of_torch_is_one_line(tmp_path: Path) -> None:
    program = """
    import os, signal
    from pt2_core.process.stop import until_run_cli
    until_run_cli("quantize.sensitivities")
    os.kill(os.getpid(), signal.SIGTERM)
    """
    run = python(program)
    error = "quantize.sensitivities: interrupted by SIGTERM (exit code 143)\n"
    assert run.communicate(timeout=30) == ("", error) and run.returncode == 143


def test_a_signal_while_something_is_made_waits_until_it_is_known(tmp_path: Path) -> None:
    with pytest.raises(stop.Stopped) as e, stop.signals_stop():
        made = []
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            made.append("thing")
    assert e.value.number == signal.SIGTERM and made == ["thing"]


def test_an_error_during_the_clean_up_counts_as_the_signal(capsys) -> None:
    def body() -> int:
        try:
            raise stop.Stopped(signal.SIGHUP)
        finally:
            raise OSError(5, "the terminal is gone")

    assert run_cli("pt2-test", body) == 129
    assert capsys.readouterr().err == "pt2-test: interrupted by SIGHUP (exit code 129)\n"


def test_the_resume_command_can_be_pasted() -> None:
    argv = ["my model", "-o", "a'b", "--overwrite", "--resume"]
    assert resume_command("pt2-quantize", argv) == "pt2-quantize 'my model' -o 'a'\"'\"'b' --resume"


# Children -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
def test_a_child_s_output_and_status_are_its_own(tree, tmp_path: Path) -> None:
    done = children.run(["sh", "-c", "echo out; echo err >&2; exit 7"], tree=tree)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 7)
    assert children.run(["sh", "-c", "kill -SEGV $$"], tree=tree).returncode == -signal.SIGSEGV
    env = {**os.environ, "NAME": "a b"}
    assert children.run(["sh", "-c", 'echo "$NAME$1" >&2', "x", "-rf"], env=env, tree=tree,
                        merge=True).stdout == "a b-rf\n"  # fmt: skip
    ignored = children.run(["sh", "-c", "kill -PIPE $$; echo alive"], tree=tree)
    assert ignored.returncode == -signal.SIGPIPE, "Python's ignored signals are not handed down"


def test_a_missing_program_and_a_late_one_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        children.run(["no-such-program"])
    (tmp_path / "data").write_text("x")
    with pytest.raises(PermissionError):
        children.run([str(tmp_path / "data")])
    with pytest.raises(children.TimeoutExpired, match=r"\['sleep', '60'\]"):
        children.run(["sleep", "60"], timeout=0.2)


# Temporary files and folders ----------------------------------------------------------------------


def test_only_dead_temporary_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.bin.dead1.tmp").write_text("x")
    (tmp_path / ".b.bin.dead2.tmp").write_text("x")
    (tmp_path / ".a.bin.backup").write_text("mine")
    with temporary_file(tmp_path / "a.bin") as tmp:
        assert [p.name for p in remove_dead(tmp_path)] == [".b.bin.dead2.tmp"]
        assert tmp.exists() and not (tmp_path / ".a.bin.dead1.tmp").exists()
        with temporary_file(tmp_path / "a.bin") as other:
            assert tmp.exists() and other != tmp
    assert [p.name for p in tmp_path.iterdir()] == [".a.bin.backup"]


def test_a_dead_folder_is_removed_and_a_live_one_is_not(tmp_path: Path) -> None:
    dead = tmp_path / ".work-abc"
    (dead / "deep").mkdir(parents=True)
    (dead / "deep" / "file").write_text("x")
    (dead / "lock").touch()
    with temporary_folder(tmp_path, ".work-") as work:
        assert not dead.exists()
        with temporary_folder(tmp_path, ".work-") as other:
            assert work.exists() and other.exists()
    assert not list(tmp_path.iterdir())


# One run in a folder ------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from pt2_core.cli import run_cli
from pt2_core.process.locks import folder_lock
def body():
    with folder_lock(sys.argv[1]):
        Path(sys.argv[2]).write_text("ready")
        time.sleep(300)
sys.exit(run_cli("pt2-quantize", body))
"""


def test_a_second_run_is_refused_by_name_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    run = python(HOLDER, out, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    with pytest.raises(PT2Error) as e, folder_lock(out):
        pass
    assert f"{out} is in use by process {run.pid} (pt2-quantize)" in str(e.value)
    run.kill()
    run.communicate()
    assert (out / LOCK).exists()
    with folder_lock(out), folder_lock(out):  # nested calls of one process are fine
        assert str(os.getpid()) in (out / LOCK).read_text()
    assert not list(out.iterdir())


def test_a_folder_made_for_a_lock_goes_unless_something_was_written(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "a" / "b" / "result").exists()


# Words --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nowhere", "self"])
def test_a_folder_that_is_a_dangling_link_is_said_to_be_one(target, tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(PT2Error, match=rf"link is a link to {target}, which is not there"):
        make_folder(tmp_path / "link" / "deep")


def test_a_short_write_of_numpy_is_the_limit_where_there_is_one() -> None:
    program = """
    import resource
    from pt2_core.errors import reason
    short = OSError("100 requested and 0 written")
    print(reason(short).split(";")[0])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    print(reason(short))
    """
    out, _ = python(program).communicate(timeout=30)
    assert out.splitlines() == [
        "the disk is full",
        "the file is larger than files may be here (see ulimit -f), or the disk is full",
    ]
    assert "read-only" in reason(OSError(30, "x")) and "circle" in reason(OSError(40, "x"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_named_and_not_the_disk(unbuffered) -> None:
    program = """
    import sys
    from pt2_core.cli import run_cli
    sys.exit(run_cli("pt2-test", lambda: print("result")))
    """
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], stdout=full,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "stdout cannot be written: what it goes to is full" in run.stderr


def test_a_reader_that_leaves_ends_a_command_quietly(tmp_path: Path) -> None:
    program = """
    import sys
    from pathlib import Path
    from pt2_core.cli import run_cli
    from pt2_core.files import atomic_path
    def body():
        with atomic_path(Path(sys.argv[1]) / "x"):
            while True:
                print("line")
    sys.exit(run_cli("pt2-test", body))
    """
    run = python(program, tmp_path)
    assert run.stdout is not None and run.stderr is not None
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(30) == 128 + signal.SIGPIPE and run.stderr.read() == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (MemoryError(), "cpu"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate "
                      "memory: you tried to allocate 9 bytes."), "cpu"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "cpu"),
        (OSError(12, "Cannot allocate memory"), "cpu"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "gpu"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB"), "gpu"),
        (RuntimeError("shapes do not fit"), None),
        (PT2Error("out of memory is a word in a name"), None),
    ],
)  # fmt: skip
def test_memory_that_ran_out_is_recognised(error, where, capsys) -> None:
    assert memory.out_of_memory(error) == where
    wrapped = PT2Error("cannot do it")
    wrapped.__cause__ = error
    assert memory.out_of_memory(wrapped) == where

    def body() -> int:
        raise error

    if where is not None:
        assert run_cli("pt2-test", body, lower="--batch-size or --samples") == 2
        line = capsys.readouterr().err
        assert "use a smaller --batch-size or --samples" in line and line.count("\n") == 1
        assert ("--device cpu" in line) == (where == "gpu")


@pytest.mark.parametrize("allocate", ["numpy.ones(1 << 33)", "torch.ones(1 << 33)",
                                      "bytearray(1 << 40)"])  # fmt: skip
def test_a_real_limit_of_memory_gives_one_line(allocate) -> None:
    module = allocate.split(".")[0]
    program = f"""
    import resource, sys
    from pt2_core.cli import run_cli
    {f"import {module}" if "." in allocate else ""}
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    sys.exit(run_cli("pt2-test", lambda: len({allocate}), lower="--samples"))
    """
    run = python(program)
    _, error = run.communicate(timeout=120)
    assert run.returncode == 2, error
    assert error.startswith("pt2-test: error: out of memory: use a smaller --samples")
    assert error.count("\n") == 1


def test_text_is_shown_as_it_is_whatever_is_in_it(capsys) -> None:
    from rich.table import Table

    table = Table(title="title [b]x")
    table.add_column("[v2]")
    table.add_row("[/b] :smile:")
    words.screen(width=60).print(table)
    words.screen().print("a [b]folder[/b] [/x] :smile: [v2]")
    shown = capsys.readouterr().out
    for text in ("title [b]x", "[v2]", "[/b] :smile:", "a [b]folder[/b] [/x] :smile: [v2]"):
        assert text in shown


def test_no_sign_and_no_file_name_ends_an_ascii_terminal_s_run() -> None:
    program = r"""
    import sys
    from pt2_core.cli import run_cli
    from pt2_core.words import screen
    def body():
        print("12 \xb1 3 \u2248 mod\udcff \u6a21")
        screen().print("12 \xb1 3")
    sys.exit(run_cli("pt2-test", body))
    """
    for env in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}):
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True,
            env={**os.environ, **env},
        )  # fmt: skip
        assert run.returncode == 0 and run.stderr == b"", run.stderr
        assert b"mod\xff" in run.stdout
        first = b"12 +- 3 ~ mod" if "PYTHONUTF8" in env else "12 ± 3 ≈ mod".encode()
        assert run.stdout.startswith(first)


def test_a_name_that_is_not_utf8_is_kept_in_json_or_named(tmp_path: Path, capsys) -> None:
    name = os.fsdecode(b"mod\xff")
    write_json(tmp_path / "run.json", {"model_dir": name, "other": "ö"})
    assert json.loads((tmp_path / "run.json").read_bytes().decode())["model_dir"] == name
    assert read_json(tmp_path / "run.json")["other"] == "ö"

    def body() -> int:
        f"/some/{name}/file".encode()
        return 0

    assert run_cli("pt2-test", body) == 2
    assert r"the name 'mod\xff' is not UTF-8" in capsys.readouterr().err


def test_threads_are_bounded() -> None:
    for good in (None, 0, 1, 8):
        check_threads(good)
    for bad in (-1, 2000, 10**9):
        with pytest.raises(PT2Error, match=rf"--threads {bad}: this machine has \d+ CPUs"):
            check_threads(bad)
