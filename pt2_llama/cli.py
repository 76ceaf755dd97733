"""The ``pt2-llama`` command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pt2_core import formats
from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.commands import command
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes
from pt2_llama import api, builds, pinned, source
from pt2_llama.builds import Build
from pt2_llama.cache import cache_root, folder_bytes, places

EPILOG = f"""\
examples:
  pt2-llama build                          # fetch, patch, build for this CPU (about 8 minutes on
                                           # 2 cores; again only what changed)
  pt2-llama build --cuda --cuda-arch 90    # for H100 and H200
  pt2-llama run llama-cli -m model.gguf    # a chat model; a base model:
  pt2-llama run llama-completion -m model.gguf -no-cnv -p "Once upon a time" -n 64
  pt2-llama serve model.gguf               # an OpenAI-compatible server on 127.0.0.1:8080
  pt2-llama run --variant stock llama-bench -m model.gguf
  pt2-llama pack --out laptop.tar.gz       # for a machine that shall not compile; there:
  pt2-llama unpack laptop.tar.gz
  pt2-llama bindings                       # for pt2-eval and llama_cpp in this Python, where
                                           # build could not install them
  eval "$(pt2-llama env)"                  # llama-* on PATH; llama-cpp-python uses our libraries
  pt2-llama doctor                         # what is there, what is missing
  pt2-llama repin 0.3.99                   # do our edits fit another llama-cpp-python?

The source is {source.describe_pin()}.
Everything lives in the cache: $PT2_CACHE, else $XDG_CACHE_HOME/pt2, else ~/.cache/pt2.
"""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="pt2-llama",
        description="Build and run the llama.cpp that knows the ternary types "
        f"{' and '.join(formats.NAMES)}.",
        epilog=EPILOG,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_build(commands.add_parser("build", help="fetch, patch, build and smoke-test"))

    run = commands.add_parser("run", help="run a built program; its exit status is passed on")
    _add_variant(run)
    run.add_argument("tool", help="such as llama-cli, llama-bench, llama-perplexity")
    run.add_argument("args", nargs=argparse.REMAINDER, help="the program's own arguments")

    _add_serve(commands.add_parser("serve", help="serve a model to OpenAI-compatible clients"))

    env = commands.add_parser("env", help="print shell exports (PATH, LLAMA_CPP_LIB_PATH)")
    _add_variant(env)
    env.add_argument("--json", action="store_true", help="a JSON object instead of exports")

    doctor = commands.add_parser("doctor", help="show compilers, CPU, GPU, cache and builds")
    doctor.add_argument("--json", action="store_true", help="a JSON object instead of a table")

    sources = commands.add_parser("source", help="print the patched source tree's path")
    sources.description = "Fetch and patch the source if needed, and print where it is."

    bindings = commands.add_parser(
        "bindings", help="install llama-cpp-python's bindings into this Python, compiling nothing"
    )
    bindings.add_argument("--source", type=Path, metavar="PATH", help="archive, not a download")
    bindings.add_argument("--force", action="store_true", help="replace what is installed")

    pack = commands.add_parser("pack", help="write a build as one archive, for another machine")
    pack.description = (
        "Write the current build (programs, libraries, llama.cpp's converter, the Python bindings) "
        "as one archive. It runs on machines with the same system and an equal or newer CPU and C "
        "library; a native build asks for the instructions of the CPU it was made on."
    )
    _add_variant(pack)
    pack.add_argument("--out", type=Path, metavar="FILE", help="the archive (default: named here)")

    unpack = commands.add_parser("unpack", help="install an archive of pack into the cache")
    unpack.add_argument("archive", type=Path, metavar="FILE", help="what pt2-llama pack wrote")
    unpack.add_argument("--sha256", metavar="HEX", help="refuse a file with another SHA-256")
    _add_no_bindings(unpack)

    repin = commands.add_parser("repin", help="try our edits on another llama-cpp-python")
    repin.description = (
        "Say of every edit whether another version takes it (ok, moved, ambiguous, missing), and "
        "print the constants to pin. Nothing is compiled; the exit status is 1 unless all fit."
    )
    repin.add_argument("version", metavar="VERSION", help=f"such as {pinned.VERSION}")
    repin.add_argument("--archive", type=Path, metavar="FILE", help="its archive, not a download")
    repin.add_argument("--commit", metavar="ID", help="of llama.cpp (default: of its change log)")
    repin.add_argument("--write", action="store_true", help="write the constants to pinned.py")

    clean = commands.add_parser("clean", help="remove object files and old builds from the cache")
    clean.add_argument("--all", action="store_true", help="sources and current builds as well")
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cuda", action="store_true", help="for NVIDIA GPUs as well")
    kind.add_argument("--stock", action="store_true", help="the unmodified llama.cpp, for the CPU")
    parser.add_argument("--jobs", type=int, metavar="N", help="compilers at a time (default: fits)")
    parser.add_argument(
        "--source", type=Path, metavar="PATH", help="archive or folder instead of a download"
    )
    parser.add_argument("--force", action="store_true", help="from nothing, even if it is there")
    parser.add_argument("--no-tests", action="store_true", help="leave out the test programs")
    _add_no_bindings(parser)
    parser.add_argument(
        "--cuda-arch",
        metavar="N[,N]",
        help="such as 90 (default: visible GPUs; 90 becomes 90a, which has the tensor-core "
        "instructions of H100 and H200)",
    )
    parser.add_argument(
        "--cmake-arg", action="append", default=[], metavar="ARG", help="such as -DGGML_BLAS=ON"
    )
    parser.add_argument("--no-wait", action="store_true", help="fail if another build is running")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run llama-server on a GGUF file until it is stopped (Ctrl+C or SIGTERM; running requests "
        "may end). Clients use http://HOST:PORT/v1; what they call the model does not matter."
    )
    _add_variant(parser)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf", help="the file to serve")
    add = parser.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: this machine alone)")
    add("--port", type=int, default=8080, metavar="N", help="0: a free one (default: 8080)")
    add("--slots", type=int, default=4, metavar="N", help="requests at a time (default: 4)")
    what = "tokens of a request (default: the model's, at most 8192, and what memory allows)"
    add("--context", type=int, default=0, metavar="N", help=what)
    add("--threads", type=int, default=0, metavar="N", help="of the CPU (default: llama-server's)")
    add("--template", type=Path, metavar="FILE", help="chat template, not the model's own")
    what = "small model with the same vocabulary that proposes tokens (speculative decoding)"
    add("--draft", type=Path, metavar="FILE", help=what)
    add("--api-key-file", type=Path, metavar="FILE", help="keys, a line each, to ask requests for")
    add("--log", type=Path, metavar="FILE", help="for the server's log (default: stderr)")
    what = "seconds that running requests get when it is stopped (default: 5)"
    add("--grace", type=float, default=5.0, metavar="S", help=what)
    what = "further argument of llama-server, such as --server-arg=--mlock"
    add("--server-arg", action="append", default=[], metavar="ARG", help=what)


def _add_no_bindings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-bindings",
        action="store_true",
        help="do not install llama-cpp-python's bindings into this Python",
    )


def _add_variant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variant", choices=builds.VARIANTS, default="cpu", help="which build (default: cpu)"
    )


def _build(args: argparse.Namespace) -> int:
    from pt2_llama.build import Options, build  # pulls in numpy and gguf

    check_threads(args.jobs, "--jobs")
    if args.jobs is not None and args.jobs < 1:
        raise PT2Error(f"--jobs {args.jobs}: at least 1")
    variant = "cuda" if args.cuda else "stock" if args.stock else "cpu"
    options = Options(
        variant=variant,
        tests=not args.no_tests,
        jobs=args.jobs,
        source=args.source,
        force=args.force,
        cuda_arch=args.cuda_arch,
        cmake_args=tuple(args.cmake_arg),
        wait=not args.no_wait,
    )
    return _made(build(options, places()), args.no_bindings)


def _made(build: Build, no_bindings: bool) -> int:
    """A build is there: the bindings beside it, and its programs' folder on stdout."""
    if not no_bindings and build.variant != "stock":
        from pt2_llama import bindings

        bindings.install_if_possible(places())
    print(build.bin_dir)
    return 0


def _pack(args: argparse.Namespace) -> int:
    from pt2_llama.pack import pack

    print(pack(places(), args.variant, args.out))
    return 0


def _unpack(args: argparse.Namespace) -> int:
    from pt2_llama.unpack import unpack

    return _made(unpack(args.archive, places(), args.sha256), args.no_bindings)


def _run(args: argparse.Namespace) -> int:
    build = api.require_build(args.variant)
    tool = build.tool(args.tool)
    sys.stdout.flush()
    # Python ignores it, and a program would inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.execve(tool, [str(tool), *args.args], build.env())


def _serve(args: argparse.Namespace) -> int:
    from pt2_llama.serve import Options, serve

    check_threads(args.threads)
    for option, value in (("--slots", args.slots), ("--context", args.context or 1)):
        if not 1 <= value <= 1 << 20:
            raise PT2Error(f"{option} {value}: a number from 1 to {1 << 20} is meant")
    if not 0 <= args.grace <= 3600:
        raise PT2Error(f"--grace {args.grace}: seconds from 0 to 3600 are meant")
    names = ("host", "port", "slots", "context", "threads", "template", "draft", "log", "grace")
    given = {name: getattr(args, name) for name in (*names, "api_key_file")}
    serve(
        api.require_build(args.variant), args.model, Options(**given, more=tuple(args.server_arg))
    )
    return 0


def _env(args: argparse.Namespace) -> int:
    exports = api.require_build(args.variant).exports()
    if args.json:
        print(json.dumps(exports, indent=1))
    else:
        for name, value in exports.items():
            print(f"export {name}={shlex.quote(value)}")
    return 0


def _bindings(args: argparse.Namespace) -> int:
    from pt2_llama import bindings

    bindings.install(places(), args.source, args.force)
    return 0


def _repin(args: argparse.Namespace) -> int:
    from pt2_llama.repin import repin

    target = Path(pinned.__file__) if args.write else None
    return repin(places(), args.version, args.archive, args.commit, target)


def _clean(args: argparse.Namespace) -> int:
    before = folder_bytes(cache_root())
    removed = builds.clean(places(), args.all)
    for folder in removed:
        print(f"removed {folder}")
    print(f"freed {human_bytes(before - folder_bytes(cache_root()))}")
    return 0


def _source(args: argparse.Namespace) -> int:
    print(api.source_dir())
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from pt2_llama.doctor import doctor

    return doctor(places(), as_json=args.json)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``pt2-llama``."""
    args = make_parser().parse_args(argv)
    bodies = {
        "build": _build,
        "run": _run,
        "serve": _serve,
        "env": _env,
        "doctor": _doctor,
        "source": _source,
        "bindings": _bindings,
        "pack": _pack,
        "unpack": _unpack,
        "repin": _repin,
        "clean": _clean,
    }
    # A build that is started again goes on from the object files that are there.
    again = command("pt2-llama", *(sys.argv[1:] if argv is None else argv))
    return run_cli(
        "pt2-llama",
        lambda: bodies[args.command](args),
        resume=lambda: again if args.command == "build" else None,
    )


if __name__ == "__main__":
    sys.exit(main())
