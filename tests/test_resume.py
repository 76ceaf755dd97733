"""Runs that were stopped at the worst moments, and folders that two runs want at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from export_support import make_model
from quantize_support import SAMPLES, SEQLEN, artifact_bytes, tiny_model, token_file
from safetensors.torch import save_file

from pt2_core.artifact.folder import PROOF, Artifact, block_file, read_manifest
from pt2_core.errors import PT2Error
from pt2_core.model.fingerprint import CACHE
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from quantize import sensitivities
from quantize.cli import main as quantize_main
from quantize.config import Config
from quantize.pipeline import ternarize
from quantize.refinement.config import RefineConfig
from quantize.refinement.loop import refine
from quantize.refinement.state import STATE

REFINE = {
    "steps": 4, "batch_size": 2, "micro_batch": 2, "seqlen": 16, "held_out": 2, "eval_every": 2,
    "save_every": 100, "device": "cpu", "dtype": "float32", "threads": 1,
}  # fmt: skip


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "t.safetensors"
    ids = torch.randint(0, 96, (1200,), generator=torch.Generator().manual_seed(5))
    save_file({"train": ids.to(torch.int32)}, file)
    return f"{file}:train"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    calibration = token_file(tmp_path_factory.mktemp("calibration") / "c.safetensors")
    return Config(calibration=calibration, samples=SAMPLES, seqlen=SEQLEN, threads=1, device="cpu")


@pytest.fixture(scope="module")
def source(model, config, tmp_path_factory) -> Path:
    return ternarize(model, tmp_path_factory.mktemp("source") / "a", config).path


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[str]:
    """Let the ``number``-th file that gets its final name be the last; returns their names."""
    names: list[str] = []
    replace = os.replace

    def counted(old, new):
        if Path(new).name == CACHE:  # of all runs on the machine, and no file of this one
            return replace(old, new)
        if len(names) == number:
            raise error
        names.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", counted)
    return names


# A finished block whose file is gone or damaged ---------------------------------------------------


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("fault", ["gone", "damaged"])
@pytest.mark.parametrize("file", ["block-00000", "block-00001", "block-00002", "global"])
def test_resume_makes_again_what_is_gone_or_damaged(
    file, fault, complete, model, config, source, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "a"
    if complete:
        shutil.copytree(source, out)
    else:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, 13, Killed())
            ternarize(model, out, config)
        if not (out / f"{file}.safetensors").exists():
            pytest.skip("the stopped run had not come as far")
    path = out / f"{file}.safetensors"
    path.unlink() if fault == "gone" else path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    reporter = Reporter()
    ternarize(model, out, config, resume=True, reporter=reporter)
    assert artifact_bytes(out) == artifact_bytes(source)
    said = " ".join(reporter.warnings)
    assert f"{file}.safetensors is {fault}" in said and ": " in said
    if file == "block-00001":
        assert "quantising again from block 1 on" in said


@pytest.fixture(scope="module")
def proven_model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("proven") / "model")


@pytest.fixture(scope="module")
def proven(proven_model, config, tmp_path_factory) -> Path:
    path = ternarize(proven_model, tmp_path_factory.mktemp("proven") / "a", config).path
    assert PROOF in read_manifest(path)["files"]
    return path


@pytest.mark.parametrize("fault", ["gone", "damaged", "of blocks that are made again"])
def test_resume_makes_a_proof_again(
    fault, proven_model, proven, config, tmp_path, monkeypatch
) -> None:
    out = tmp_path / "a"
    shutil.copytree(proven, out)
    if fault == "gone":
        (out / PROOF).unlink()
    else:
        path = out / (PROOF if fault == "damaged" else block_file(1))
        path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    names = stop_at(monkeypatch, 10**6, Killed())
    reporter = Reporter()
    ternarize(proven_model, out, config, resume=True, reporter=reporter)
    assert PROOF in names and artifact_bytes(out) == artifact_bytes(proven)
    assert (block_file(1) in names) == (fault not in ("gone", "damaged"))
    assert f"{PROOF} is {fault}" in reporter.warnings[0] or block_file(1) in reporter.warnings[0]


def test_resume_finishes_an_artifact_that_only_its_proof_lacks(
    proven_model, proven, config, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        names = stop_at(patch, 10**6, Killed())
        ternarize(proven_model, tmp_path / "whole", config)
    out = tmp_path / "a"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, names.index(PROOF), Killed())
        ternarize(proven_model, out, config)
    assert not read_manifest(out)["complete"] and not (out / PROOF).exists()
    ternarize(proven_model, out, config, resume=True)
    assert artifact_bytes(out) == artifact_bytes(proven)


# pt2-refine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["gone", "damaged"])
def test_a_finished_refinement_s_proof_is_made_again(fault, proven, text, tmp_path) -> None:
    settings = RefineConfig(**REFINE, text=text)
    out = refine(proven, tmp_path / "r", settings).path
    want = artifact_bytes(out)
    data = (out / PROOF).read_bytes()
    (out / PROOF).unlink() if fault == "gone" else (out / PROOF).write_bytes(data[:-1] + b"\x77")
    reporter = Reporter()
    refine(proven, out, settings, resume=True, reporter=reporter)
    assert artifact_bytes(out) == want and PROOF in reporter.warnings[0]


def test_a_refinement_stopped_at_any_write_is_resumed_to_the_same_bytes(
    source, text, tmp_path, monkeypatch
) -> None:
    settings = RefineConfig(**REFINE, text=text)
    with monkeypatch.context() as patch:
        names = stop_at(patch, 10**6, Killed())
        refine(source, tmp_path / "whole", settings)
    want = artifact_bytes(tmp_path / "whole")
    assert names[0] == STATE and names[-1] == "run.json"
    out = tmp_path / "cut"
    for number in range(len(names) - 1):  # resumed, it writes no state
        error = Killed() if number % 2 else OSError(errno.ENOSPC, "full")
        resume = (out / STATE).exists()
        with monkeypatch.context() as patch, pytest.raises((Killed, PT2Error)):
            stop_at(patch, number, error)
            refine(source, out, settings, resume=resume)
        if resume and (out / "manifest.json").exists():
            with pytest.raises(PT2Error, match="state of an unfinished run"):
                refine(source, out, settings)
    refine(source, out, settings, resume=True)
    assert artifact_bytes(out) == want and (out / "run.json").is_file()


def test_resume_of_a_complete_refinement_tidies_up_and_is_done(source, text, tmp_path, monkeypatch):
    settings, out = RefineConfig(**REFINE, text=text), tmp_path / "r"
    with monkeypatch.context() as patch:
        patch.setattr(
            "quantize.refinement.loop.remove_state", lambda out: (_ for _ in ()).throw(Killed())
        )
        with pytest.raises(Killed):
            refine(source, out, settings)
    assert read_manifest(out)["complete"] and (out / STATE).exists()
    (out / f".{STATE}.abc.tmp").write_text("of a kill")
    first = refine(source, out, settings, resume=True)
    again = refine(source, out, settings, resume=True)
    assert again.after == first.after and again.before == first.before
    names = {p.name for p in out.iterdir()}
    assert not {n for n in names if "state" in n} and "run.json" in names
    with pytest.raises(PT2Error, match=r"refine\.settings\.steps was 4 and is now 5"):
        refine(source, out, RefineConfig(**{**REFINE, "steps": 5}, text=text), resume=True)


def test_overwrite_forgets_a_state_and_says_so(source, text, tmp_path, monkeypatch) -> None:
    settings, out = RefineConfig(**REFINE, text=text), tmp_path / "r"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 1, Killed())
        refine(source, out, settings)
    with pytest.raises(PT2Error, match="use --resume or --overwrite"):
        refine(source, out, settings)
    reporter = Reporter()
    refine(source, out, settings, overwrite=True, reporter=reporter)
    assert f"{STATE}, the state of an unfinished refinement, is removed" in reporter.warnings[0]


def test_a_run_that_patience_ended_is_not_trained_further(source, text, tmp_path, monkeypatch):
    settings = RefineConfig(
        **{**REFINE, "steps": 30, "lr": 1.0, "lr_codes": 1.0, "eval_every": 1, "patience": 1,
           "warmup": 0.0}, text=text,
    )  # fmt: skip
    refine(source, tmp_path / "whole", settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 3, Killed())
        refine(source, tmp_path / "cut", settings)
    refine(source, tmp_path / "cut", settings, resume=True)
    assert artifact_bytes(tmp_path / "cut") == artifact_bytes(tmp_path / "whole")


def test_the_recipe_refined_is_resumed_from_its_last_writing(text, tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", num_hidden_layers=1)

    def run(out: Path, *more: str) -> int:
        return quantize_main([
            str(model), "-o", str(out), "--recipe", "refined", "--samples", "4", "--seqlen", "16",
            "--calibration", text, "--device", "cpu", "--threads", "1", "--refine-steps", "1",
            "--rounds", "0", "-q", *more,
        ])  # fmt: skip

    assert run(tmp_path / "whole") == 0

    def everything(out: Path) -> dict[str, bytes]:
        files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != "run.json"]
        return {str(p.relative_to(out)): p.read_bytes() for p in files}

    from pt2_core.artifact.folder import ArtifactWriter

    def stop(*args: object, **more: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ArtifactWriter, "write_replaced", stop)
        run(tmp_path / "cut")
    assert not read_manifest(tmp_path / "cut")["complete"]
    assert run(tmp_path / "cut", "--resume") == 0
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")
    # A stopped --overwrite is not taken for done because the old result is still there.
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("quantize.refinement.recipe.refine", stop)
        run(tmp_path / "cut", "--overwrite", "--seed", "1")
    assert run(tmp_path / "cut", "--resume", "--seed", "1") == 0
    assert Artifact.open(tmp_path / "cut").manifest["settings"]["seed"] == 1


# Two runs in one folder ---------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder ``held``."""
    (tmp_path / "held").mkdir()
    program = """
import sys, time
from pt2_core.process.locks import folder_lock
with folder_lock(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(300)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "held")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_a_folder_in_use_is_refused_by_every_command_that_writes_an_artifact(
    holder, model, config, source, text, tmp_path, capsys
) -> None:
    held = tmp_path / "held"
    words = f"{held} is in use by process {holder.pid}"
    for more in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(PT2Error, match=words):
            ternarize(model, held, config, **more)
        with pytest.raises(PT2Error, match=words):
            refine(source, held, RefineConfig(**REFINE, text=text), **more)
    arguments = [str(model), "-o", str(held), "--calibration", text, "--samples", "4",
                 "--seqlen", "16", "--device", "cpu"]  # fmt: skip
    for recipe in ("fast", "refined"):
        assert quantize_main([*arguments, "--recipe", recipe]) == 2
        assert words in capsys.readouterr().err
    for file in source.iterdir():
        shutil.copy(file, held)
    before = artifact_bytes(held)
    assert sensitivities.main([str(held), "--model", str(model), "--calibration", text]) == 2
    assert words in capsys.readouterr().err
    assert artifact_bytes(held) == before


def test_a_lock_holds_between_threads_of_a_program_as_well(tmp_path) -> None:
    refused = []

    def second() -> None:
        try:
            with folder_lock(tmp_path):
                pass
        except PT2Error as e:
            refused.append(str(e))

    with folder_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert refused and f"in use by process {os.getpid()}" in refused[0]


# Everything, in processes of their own ------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_commands_stopped_at_random_leave_nothing_and_end_in_the_same_bytes() -> None:
    script = Path(__file__).with_name("kill_everything.py")
    rounds = os.environ.get("PT2_KILLS", "1")
    done = subprocess.run(
        [sys.executable, str(script), "--rounds", rounds, "--signals", "TERM,HUP,KILL",
         "--commands", "pt2-quantize,pt2-refine,pt2-bench,pt2-llama"],
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{rounds}/{rounds}") == 12
