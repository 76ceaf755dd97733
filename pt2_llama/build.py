"""``pt2-llama build``: from the pinned archive to a checked build in the cache."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pt2_core import formats
from pt2_core.errors import PT2Error
from pt2_core.files import human_seconds
from pt2_core.process.temporary import temporary_folder
from pt2_core.progress import say
from pt2_llama import builds, compile, pinned, programs, smoke, source, toolchain
from pt2_llama.builds import Build, Stamp
from pt2_llama.cache import Places, check_disk, lock
from pt2_llama.edits import EditsDoNotFit
from pt2_llama.overlay import Overlay, load_overlay, stamp_digest, sync_patched

DISK_BYTES = {"cpu": 1_000_000_000, "stock": 600_000_000, "cuda": 5_000_000_000}

_OURS = " and ".join(formats.NAMES)
NO_CUDA_KERNELS = (
    f"{_OURS} have no CUDA kernels yet: in CUDA builds tensors of these types run on the CPU"
)
CUDA_KERNELS = (
    f"{_OURS} run on the GPU: kernels of our own from compute capability 8.0 on, those that "
    "llama.cpp's types share on older cards"
)


@dataclass(frozen=True)
class Options:
    """What to build.

    Attributes:
        variant: "cpu", "cuda" or "stock".
        tests: also test-backend-ops and test-quantize-fns (not for stock).
        jobs: parallel compilers; None fits CPUs and memory.
        source: archive or folder instead of a download.
        force: build from nothing even if a matching build exists.
        cuda_arch: CUDA architectures, None for those of the visible GPUs.
        cmake_args: more options for CMake.
        wait: wait while another process uses the cache.
    """

    variant: str = "cpu"
    tests: bool = True
    jobs: int | None = None
    source: Path | None = None
    force: bool = False
    cuda_arch: str | None = None
    cmake_args: tuple[str, ...] = ()
    wait: bool = True


@dataclass(frozen=True)
class Plan:
    """Everything decided before anything is built."""

    options: Options
    tc: toolchain.Toolchain
    flags: tuple[str, ...]
    tools: tuple[str, ...]
    library_path: tuple[str, ...]
    overlay: Overlay | None
    cpu: str

    @property
    def digest(self) -> str | None:
        """Digest of the variant's part of the overlay, None for stock."""
        if self.overlay is None:
            return None
        return self.overlay.for_variant(self.options.variant).digest()

    @property
    def key(self) -> str:
        """Key of the finished build."""
        return builds.build_key(self.digest, self.flags, self.tools, self.tc.cxx_version, self.cpu)

    @property
    def objects_name(self) -> str:
        """Name of the object folder: it does not depend on the overlay, which ninja follows.

        CMake refuses a folder that it has configured for another build program.
        """
        flags = self.flags if self.tc.ninja else (*self.flags, self.tc.generator)
        key = builds.build_key("", flags, (), self.tc.cxx_version, self.cpu)
        return f"{self.options.variant}-{key[:12]}"


def make_plan(options: Options, where: Places) -> Plan:
    """Decide programs, options and keys.

    Raises:
        PT2Error: a program is missing, or an option does not fit.
    """
    builds.check_variant(options.variant)
    cuda = options.variant == "cuda"
    tc = toolchain.find_toolchain(cuda, programs.fetched(where))
    flags = [*compile.base_flags(), *compile.toolchain_flags(tc)]
    library_path: tuple[str, ...] = ()
    if tc.nvcc is not None:
        cublas = toolchain.find_cublas(tc.nvcc)
        architectures = toolchain.cuda_architectures(options.cuda_arch)
        flags += compile.cuda_flags(
            architectures, tc.nvcc, cublas, toolchain.has_driver_library(tc.nvcc)
        )
        if cublas.library is not None:
            library_path = (str(cublas.library.parent),)
    elif options.cuda_arch:
        raise PT2Error("--cuda-arch needs --cuda")
    flags += options.cmake_args
    tools = compile.STOCK_TOOLS if options.variant == "stock" else compile.TOOLS
    if options.tests and options.variant != "stock":
        tools += compile.TEST_TOOLS
    overlay = None if options.variant == "stock" else load_overlay(where.overlay)
    return Plan(options, tc, tuple(flags), tools, library_path, overlay, toolchain.cpu_signature())


def ensure_pristine(where: Places, given: Path | None = None) -> Path:
    """The unmodified source in the cache, fetched when it is missing. Needs the lock.

    Raises:
        PT2Error: as :func:`source.make_pristine`.
    """
    if given is not None:
        source.check_given(given)
    if where.pristine.is_dir():
        try:
            source.check_tree(where.pristine)
            # Equal digests are equal files: a --source that passed its check adds nothing.
            return where.pristine
        except PT2Error:
            say("the cached source has been changed: making it anew")
    check_disk(where.root, 400_000_000, "fetching the source")
    source.make_pristine(where.pristine, given)
    return where.pristine


def ensure_patched(where: Places, overlay: Overlay, given: Path | None = None) -> Path:
    """The patched source in the cache, in step with the overlay. Needs the lock."""
    pristine = ensure_pristine(where, given)
    try:
        changed = sync_patched(pristine, where.patched, overlay)
    except EditsDoNotFit as e:
        if len(e.misfits) > 1:  # one is the message itself, of many it may show a part
            for misfit in e.misfits:
                say(str(misfit))
        raise
    if changed:
        say(f"overlay and edits applied: {changed} files changed in {where.patched}")
    return where.patched


def source_dir(where: Places) -> Path:
    """The patched source tree, fetched and patched when needed."""
    overlay = load_overlay(where.overlay)
    if stamp_digest(where.patched) == overlay.digest():
        return where.patched
    with lock(where, "preparing the source"):
        return ensure_patched(where, overlay)


def build(options: Options, where: Places) -> Build:
    """Make a build, or return the one that is there already.

    Raises:
        PT2Error: anything that stops it, with what to do.
    """
    start = time.monotonic()
    builds.check_variant(options.variant)
    programs.ensure(where, options.wait)
    plan = make_plan(options, where)
    with lock(where, f"build of the {options.variant} variant", options.wait):
        # The overlay may have changed while we waited.
        plan = make_plan(options, where)
        if not options.force and (ready := _ready(plan, where)):
            say(f"nothing to do: {ready.describe()}")
            return ready
        if plan.overlay is None:
            tree = ensure_pristine(where, options.source)
        else:
            tree = ensure_patched(where, plan.overlay, options.source)
        check_disk(where.root, DISK_BYTES[options.variant], f"a {options.variant} build")
        made = _compile_and_check(plan, where, tree)
        for folder in builds.prune(where, keep=made):
            say(f"removed the older build {folder.name}")
    say(f"built in {human_seconds(time.monotonic() - start)}: {made.describe()}")
    for note in made.stamp.notes:
        say(f"note: {note}")
    say(f"programs and libraries: {made.bin_dir}")
    return made


def _ready(plan: Plan, where: Places) -> Build | None:
    found = builds.read_build(where.builds / f"{plan.options.variant}-{plan.key}")
    complete = found and all((found.bin_dir / tool).is_file() for tool in found.stamp.tools)
    return found if complete else None


def _compile_and_check(plan: Plan, where: Places, tree: Path) -> Build:
    options = plan.options
    objects = where.objects / plan.objects_name
    if options.force and objects.exists():
        shutil.rmtree(objects)
    objects.mkdir(parents=True, exist_ok=True)
    where.builds.mkdir(parents=True, exist_ok=True)
    log = objects / "build.log"
    log.unlink(missing_ok=True)
    jobs = options.jobs or toolchain.default_jobs("cuda" if plan.tc.nvcc else "cpu")
    describe = f"{plan.tc.cxx_version}, {plan.tc.generator}, {jobs} jobs"
    say(f"building {options.variant} of {source.describe_pin()} with {describe}; log: {log}")
    smoke_results: dict[str, float] = {}
    with temporary_folder(where.builds, ".staged-") as work:
        staged = work / "build"

        def compile_with(amx: bool) -> None:
            flags = [*plan.flags, *compile.amx_flags(objects, amx)]
            compile.configure(plan.tc, tree, objects, flags, log)
            compile.compile_targets(plan.tc, tree, objects, plan.tools, jobs, log)
            builds.stage(objects / "bin", staged / "bin", plan.tools)

        seen = toolchain.compiler_sees_amx(plan.tc.cc)
        known_bad = seen and builds.amx_faults(where)
        if known_bad:
            say("AMX is left out: an earlier build found that it faults on this CPU")
        test = _smoke(plan, staged, log, smoke_results)
        used = smoke.build_until_it_runs(compile_with, test, seen and not known_bad, say)
        amx = "on" if used else ("faults" if seen else "off")
        shutil.copy2(log, staged / "build.log")
        return builds.publish(where, staged, _stamp(plan, amx, smoke_results))


def _smoke(
    plan: Plan, staged: Path, log: Path, results: dict[str, float]
) -> Callable[[], smoke.Failure | None]:
    """The smoke test as :func:`smoke.build_until_it_runs` wants it; fills ``results``."""
    types = smoke.STOCK_TYPES
    if plan.options.variant != "stock":
        types += smoke.OUR_TYPES
    gpu = plan.options.variant == "cuda" and bool(toolchain.gpus())

    def test() -> smoke.Failure | None:
        probe = Build(staged, _stamp(plan, "off", {}))
        values, failure = smoke.smoke_test(staged / "bin", probe.env(), types, gpu)
        results.clear()
        results.update(values)
        with log.open("a") as out:
            out.write(f"smoke test: {values}\n")
            if failure:
                out.write(f"{failure.what}: {failure.reason}\n{failure.output}\n")
        if failure and not failure.crashed:
            for line in failure.output.splitlines()[-8:]:
                say(f"  {line[:300]}")
        return failure

    return test


def _stamp(plan: Plan, amx: str, results: dict[str, float]) -> Stamp:
    notes = []
    if amx == "faults":
        notes.append("built without AMX: the CPU shows it, but its instructions fault here")
    if plan.options.variant == "cuda":
        ours = plan.overlay is not None and plan.overlay.has_cuda_kernels()
        notes.append(CUDA_KERNELS if ours else NO_CUDA_KERNELS)
        if "-DGGML_CUDA_NO_VMM=ON" in plan.flags:
            notes.append("no libcuda.so to link with: built without CUDA's virtual memory pool")
        if results and not any(label.endswith(" gpu") for label in results):
            notes.append("no GPU was visible: the smoke test ran on the CPU only")
    return Stamp(
        variant=plan.options.variant,
        key=plan.key,
        source=pinned.SDIST_SHA256,
        overlay=plan.digest,
        cpu=plan.cpu,
        amx=amx,
        tools=plan.tools,
        flags=plan.flags,
        compiler=plan.tc.cxx_version,
        smoke=dict(results),
        notes=tuple(notes),
        created=time.time(),
        library_path=plan.library_path,
    )
