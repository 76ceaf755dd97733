"""Kill the quantiser with SIGKILL at random moments, resume it, and compare every byte.

    python tests/kill_resume.py MODEL CALIBRATION --kills 10

MODEL and CALIBRATION as for pt2-quantize. The runs are forks of this process, so that what is
killed is the quantiser at work and not the import of torch. Exits with 0 if the artifacts are
identical.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from quantize_support import artifact_bytes

from pt2_core.artifact.folder import MANIFEST, Artifact, read_manifest
from quantize.config import Config


def start(model: str, out: Path, config: Config, resume: bool) -> int:
    """Fork a run; returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        from quantize.pipeline import ternarize

        ternarize(model, out, config, resume=resume)
        os._exit(0)
    except BaseException as e:
        print(f"run failed: {e}", file=sys.stderr)
        os._exit(1)


def finish(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(pid: int, seconds: float) -> bool:
    """SIGKILL the child after ``seconds``; whether it was still at work."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return finish(pid) == -signal.SIGKILL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--seqlen", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import torch  # noqa: F401  once, before the forks
    import transformers.models.llama.modeling_llama  # noqa: F401

    # One thread: OpenMP's threads would not survive the fork.
    config = Config(calibration=args.calibration, samples=args.samples, seqlen=args.seqlen,
                    threads=1, device="cpu", batch_size=2)  # fmt: skip
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        began = time.monotonic()
        if finish(start(args.model, whole, config, False)):
            return 1
        duration = time.monotonic() - began
        want = artifact_bytes(whole)
        kills, blocks, tries = 0, [], 0
        while kills < args.kills:
            tries += 1
            if tries > 20 * args.kills:
                print("the run is too short to be killed", file=sys.stderr)
                return 1
            # From the start, or on top of what the last kill left behind.
            if rng.random() < 0.3 or not (broken / MANIFEST).exists():
                for file in broken.glob("*"):
                    file.unlink()
            if not kill_at(
                start(args.model, broken, config, True), rng.uniform(0, 0.95 * duration)
            ):
                for file in broken.glob("*"):
                    file.unlink()
                continue
            kills += 1
            if (broken / MANIFEST).exists():
                state = Artifact(broken, read_manifest(broken), np.empty(0, np.int32))
                blocks.append(state.n_blocks)
                for index in range(state.n_blocks):
                    state.block(index)  # whatever the manifest names is whole
        if finish(start(args.model, broken, config, True)):
            return 1
        got = artifact_bytes(broken)
        different = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
    print(f"{kills} kills (blocks done at each: {blocks}), {len(want)} files compared")
    if different:
        print(f"different: {', '.join(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
