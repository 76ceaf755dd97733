"""Refine an artifact by gradients: end-to-end KL distillation from the full-precision model.

    pt2-refine MODEL-pt2 -o MODEL-refined --text calib.txt --device cuda
    pt2-refine MODEL-pt2 -o MODEL-refined --text calib.txt --codes frozen --steps 300
    pt2-refine MODEL-pt2 -o MODEL-refined --resume ...        take up a run that was stopped

The artifact's model (the student) and the source model (the teacher) read the same text; alpha, mu
and the norms, and with --codes ste or soft the ternary codes themselves, move so that the student's
next-token distribution comes close to the teacher's. The result is an artifact again: same format,
same size, same speed. The text's last windows are not trained on but watched, and what is written
is the state that was best on them.
"""

from __future__ import annotations

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pt2_core.artifact.folder import (
    MANIFEST,
    PROOF,
    RUN,
    Artifact,
    ArtifactWriter,
    TernaryMatrix,
    first_difference,
    read_manifest,
    remove_leftovers,
    sha256_array,
)
from pt2_core.artifact.proof import Proof
from pt2_core.artifact.source import check_made_from
from pt2_core.errors import PT2Error
from pt2_core.files import human_bytes, human_seconds, sha256_file, write_json
from pt2_core.model.checkpoint import Checkpoint, torch_dtype
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter
from pt2_core.texts.tokens import check_context, context_limit
from quantize.model.streamed import StreamedModel
from quantize.model.student import (
    ScaledNorm,
    build_student,
    build_teacher,
    check_trainable,
    ternary_maker,
    trainable,
)
from quantize.model.torch_setup import arithmetic, pick_device, versions
from quantize.proof_run import renew_proof
from quantize.refinement.config import RefineConfig
from quantize.refinement.distill import Held, Windows, held_out, kl_divergence
from quantize.refinement.state import STATE, check_tensors, load_state, remove_state, save_state
from quantize.refinement.store import (
    changed_codes,
    result_tensors,
    snapshot,
    store_proof,
    write_refined,
)
from quantize.refinement.texts import text_tokens


@dataclass
class Refined:
    """What a run made.

    Attributes:
        path: the refined artifact.
        before, after: on the held-out windows.
        history: one record per look: step, tokens, kl (training), and the held-out figures.
        seconds: of this run; tokens_per_second: of its steps, looks left out.
        peak_bytes: most GPU memory that was allocated (0 on a CPU).
        changed: share of the ternary codes that are no longer what they were.
    """

    path: Path
    before: Held
    after: Held
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    changed: float = 0.0

    def summary(self) -> str:
        """Three lines: what was gained, how many codes changed, what it cost."""
        a, b = self.before, self.after
        cost = f"{human_seconds(self.seconds)}, {self.tokens_per_second:.0f} tokens/s"
        if self.peak_bytes:
            cost += f", {human_bytes(self.peak_bytes)} of GPU memory"
        return (
            f"held-out  KL {a.kl:.4f} -> {b.kl:.4f}, perplexity {a.perplexity:.3f} -> "
            f"{b.perplexity:.3f} (full precision {b.teacher_perplexity:.3f}), same top token "
            f"{a.same_top:.1%} -> {b.same_top:.1%}\n"
            f"codes     {self.changed:.2%} changed\n"
            f"time      {cost}"
        )


def refine(
    artifact_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: RefineConfig,
    *,
    model_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Refined:
    """Refine an artifact into a new one.

    Args:
        artifact_dir: a complete artifact.
        out_dir: the refined artifact's folder; made if missing.
        model_dir: the source model; None takes the folder that the artifact was made from.
        resume: go on from the last state of a run that was stopped.
        overwrite: replace an artifact that is already there.

    Raises:
        PT2Error: anything the user can mend; one line that names what and where.
    """
    source, out = Artifact.open(artifact_dir), Path(out_dir)
    _check_names(source, out, resume, overwrite)
    with folder_lock(out):
        return _refine(source, out, config, model_dir, resume, overwrite, reporter or Reporter())


def _refine(
    source: Artifact, out: Path, config: RefineConfig, model_dir: str | os.PathLike[str] | None,
    resume: bool, overwrite: bool, reporter: Reporter,
) -> Refined:  # fmt: skip
    """:func:`refine` with the output folder locked."""
    began = time.monotonic()
    _check_output(out, resume, overwrite)
    model = source.source_model(model_dir, "--model")
    device = pick_device(config.device)
    checkpoint = Checkpoint.open(model)
    check_made_from(source, checkpoint)
    with arithmetic(config.threads), torch.enable_grad():
        streamed = StreamedModel(checkpoint, device, config.dtype)
        check_trainable(streamed.shell.model)
        check_context(
            config.seqlen, context_limit(checkpoint.raw_config), checkpoint.path.name, "--seqlen",
            allow=config.allow_long, warn=reporter.warn,
        )  # fmt: skip
        for note in checkpoint.notes:
            reporter.warn(note)
        vocab = streamed.config.vocab_size
        tokens = text_tokens(config, checkpoint.path, vocab, reporter.note)
        identity = {
            "settings": {**config.identity(), "device": device},
            "source": sha256_file(source.path / MANIFEST),
            "tokens_sha256": sha256_array(tokens.to(torch.int32).numpy()),
            "versions": versions(),
        }
        remove_leftovers(out)
        if resume and not (out / STATE).is_file() and (out / MANIFEST).exists():
            done = _complete(out, source, model, identity)
            _mend_proof(checkpoint, source, out, device, reporter)
            return done
        run = Run(config, device, tokens, reporter)
        run.prepare(streamed.config, checkpoint, source, out if resume else None, identity)
        if not resume:
            forget_state(out, reporter)  # now that nothing more can refuse this run
        if not run.ended:
            run.train(lambda: save_state(out, identity, run.state()))
            # From here on a stop costs nothing but the writing.
            save_state(out, identity, run.result())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    write_refined(
        out, source, run.snapshot, identity, run.before, run.best,
        lambda artifact: renew_proof(checkpoint, source, artifact, device),
    )  # fmt: skip
    result = Refined(
        out, run.before, run.best, run.history, time.monotonic() - began, run.speed(), peak,
        changed_codes(source, run.snapshot),
    )  # fmt: skip
    write_json(out / RUN, _run_record(source, model, result))
    remove_state(out)
    return result


def forget_state(out: Path, reporter: Reporter) -> None:
    """Remove the state of an unfinished run, and say so first."""
    if (out / STATE).is_file():
        reporter.warn(f"{out / STATE}, the state of an unfinished refinement, is removed")
        remove_state(out)


def _complete(out: Path, source: Artifact, model: Path, identity: dict[str, Any]) -> Refined:
    """What an earlier run made of the same input, checked.

    Raises:
        PT2Error: it is unfinished without a state, damaged, or of other settings.
    """
    if not read_manifest(out)["complete"]:
        raise PT2Error(f"{out} is unfinished and has no {STATE} to go on from: use --overwrite")
    artifact = Artifact.open(out)
    record = artifact.manifest.get("refinement", {})
    old = {"settings": artifact.manifest["settings"].get("refine"),
           **{k: record.get(k) for k in ("source", "tokens_sha256", "versions")}}  # fmt: skip
    difference = first_difference(old, json.loads(json.dumps(identity)), "refine")
    if difference:
        raise PT2Error(f"cannot resume {out}: {difference}; use the old settings, or --overwrite")
    for index in range(artifact.n_blocks):
        artifact.block(index)
    artifact.replaced()
    result = Refined(out, Held(**record["before"]), Held(**record["after"]))
    if not (out / RUN).is_file():
        write_json(out / RUN, _run_record(source, model, result))
    return result


def _mend_proof(
    checkpoint: Checkpoint, source: Artifact, out: Path, device: str, reporter: Reporter
) -> None:
    """Make a finished refinement's proof again where its file is gone or damaged."""
    artifact = Artifact.open(out)
    with suppress(PT2Error):
        if Proof.read(artifact) is not None or "proof" in artifact.manifest:
            return
    reporter.warn(f"{out / PROOF} is gone or damaged: making it again")
    proof = renew_proof(checkpoint, source, artifact, device)
    store_proof(ArtifactWriter(out, artifact.manifest), proof)


class Run:
    """Teacher, student and optimisers of one refinement."""

    def __init__(
        self, config: RefineConfig, device: str, tokens: Tensor, reporter: Reporter
    ) -> None:
        self.config, self.device, self.reporter = config, device, reporter
        held = config.held_out * config.seqlen
        if tokens.shape[0] < held + 2 * config.seqlen:
            raise PT2Error(
                f"the text has {tokens.shape[0]} tokens; {config.held_out} held-out windows of "
                f"{config.seqlen} and two to train on need {held + 2 * config.seqlen}: give more "
                "--text, or a smaller --held-out or --seqlen"
            )
        self.watched = tokens[-held:].view(config.held_out, config.seqlen).to(device)
        text = tokens[:-held].to(device)  # there, so that a step waits for no copy
        self.windows = Windows(text, config.seqlen, config.batch_size, config.seed)
        self.step, self.looks_without_gain = 0, 0
        self.began, self.elapsed_before = time.monotonic(), 0.0
        self.seconds, self.trained = 0.0, 0
        self.history: list[dict[str, Any]] = []
        self.snapshot: dict[str, Tensor] = {}
        self.before: Held
        self.best: Held
        self.ended = False  # whether all steps are done

    def prepare(
        self, model_config: Any, checkpoint: Checkpoint, source: Artifact, resumed: Path | None,
        identity: dict[str, Any],
    ) -> None:  # fmt: skip
        """Be ready to train, or to write what an earlier run had trained to the end.

        Args:
            resumed: the folder with the state to go on from; None starts anew.

        Raises:
            PT2Error: there is no state, or it is of another run.
        """
        if resumed is None:
            self.build(model_config, checkpoint, source)
            return
        tensors, record = load_state(resumed, identity)
        if record.get("ended"):
            restored = restored_linears(source, self.config.restore)
            wanted = result_tensors(source, checkpoint, restored, tensors)
        else:
            self.build(model_config, checkpoint, source)
            wanted = self._state_tensors()
        check_tensors(resumed, tensors, wanted)
        self.restore(tensors, record)

    def build(self, model_config: Any, checkpoint: Checkpoint, source: Artifact) -> None:
        """Load the teacher and make the student from an artifact's matrices.

        Raises:
            PT2Error: the artifact's grid has no offset, which the steps of mu would give it.
        """
        config = self.config
        if (grid := source.manifest["settings"].get("grid", "pt2")) != "pt2":
            raise PT2Error(
                f"{source.path} was quantised to the grid {grid}, which pt2-refine does not know: "
                "export it as it is, or quantise without --grid"
            )
        restored = restored_linears(source, config.restore)
        self.reporter.start("loading the models", 2, "models")
        self.teacher = build_teacher(
            model_config, checkpoint.read, self.device, torch_dtype(config.dtype),
            tied=checkpoint.tied,
        )  # fmt: skip
        self.reporter.step()
        self.attach(
            model_config,
            (
                (name, ternary_maker(*_tensors(m), moving=config.codes != "frozen",
                                     per_weight=config.per_weight, levels=m.levels))
                for index in range(source.n_blocks)
                for name, m in source.block(index).items()
                if name not in restored
            ),
        )  # fmt: skip
        self.replace(source.replaced())
        self.reporter.done()

    def attach(self, model_config: Any, matrices: Any) -> None:
        """Make the student and its optimiser; ``matrices`` as :func:`build_student` takes them."""
        config = self.config
        self.student = build_student(
            model_config, self.teacher, matrices, norms=config.norms,
            embeddings=config.embeddings, checkpointing=config.checkpointing,
        )  # fmt: skip
        grids, tables, self.latents = trainable(self.student)
        groups = [{"params": grids, "lr": config.lr}]
        if tables:
            groups.append({"params": tables, "lr": config.lr_tables})
        self.rates = [float(g["lr"]) for g in groups]  # type: ignore[arg-type]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.98), eps=1e-15, foreach=True)

    def replace(self, tensors: dict[str, Any]) -> None:
        """Start from an artifact's own norms, embeddings and head, where it has any."""
        for name, norm in self.student.modules(ScaledNorm):
            if f"{name}.weight" in tensors:
                norm.weight_0 = torch.from_numpy(tensors[f"{name}.weight"]).to(self.device)
        for name, table in self._tables().items():
            if name in tensors:
                table.weight_0 = torch.from_numpy(tensors[name]).to(self.device)

    def train(self, save: Any) -> None:
        """All steps that are left; ``save()`` is called every ``save_every`` of them."""
        config = self.config
        if self.step == 0:
            self.best = self.before = self._look()
            self._keep(float("nan"))
        self.reporter.start("refining", config.steps - self.step, "steps", every=5)
        self.began = time.monotonic()
        recent: list[Tensor] = []
        ended = self.place() >= config.steps
        while not ended:
            began = time.monotonic()
            recent.append(self.one_step())
            ended = self.place() >= config.steps  # asked once, for the clock goes on
            if self.step % config.eval_every and not ended:
                self._clock(began)
                self.reporter.step(f"{self.speed():.0f} tokens/s")
                continue
            loss = float(torch.stack(recent).mean())
            recent = []
            self._clock(began)
            if not math.isfinite(loss):
                raise PT2Error(f"the loss is {loss} at step {self.step}: use a smaller --lr")
            if self._judge(self._look(), loss):
                break
            self.reporter.step(f"KL {loss:.4f}  {self.speed():.0f} tokens/s")
            if self.step % config.save_every < config.eval_every and not ended:
                save()
        self.reporter.done()
        self.ended = True

    def elapsed(self) -> float:
        """Seconds of training so far, looks and stopped runs included."""
        return self.elapsed_before + time.monotonic() - self.began

    def place(self) -> float:
        """Where in the schedule the run is, in steps: further than ``step`` if the clock is."""
        if not self.config.minutes:
            return self.step
        return max(self.step, self.config.steps * self.elapsed() / (60 * self.config.minutes))

    def one_step(self) -> Tensor:
        """One optimiser step; returns the mean KL divergence of its tokens, on the device."""
        config = self.config
        place = min(self.place(), config.steps - 1)
        factor = schedule(place, config.steps, config.warmup)
        self._soften(place)
        batch = self.windows.step(self.step).to(self.device)
        total = torch.zeros((), device=self.device)
        for part in batch.split(config.micro_batch):
            with torch.no_grad():
                theirs = self.teacher.states(part).flatten(0, 1)
            ours = self.student.states(part).flatten(0, 1)
            loss = kl_divergence(ours, theirs, self.student.head_weight(),
                                 self.teacher.head_weight())  # fmt: skip
            loss = loss * (part.shape[0] / batch.shape[0])
            loss.backward()
            total += loss.detach()
        for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.step += 1
        for latent in self.latents:
            latent.step(config.lr_codes * factor, self.step)
        self.trained += batch.numel()
        return total

    def speed(self) -> float:
        """Tokens a second of the steps of this run."""
        return self.trained / self.seconds if self.seconds else 0.0

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs: {"tensors": ..., "record": ...}."""
        tensors = {f"snapshot.{k}": v for k, v in self.snapshot.items()}
        for i, parameter in enumerate(self._parameters()):
            tensors[f"parameter.{i}"] = parameter.detach()
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{i}"] = self.adam.state[parameter][key]
        for i, latent in enumerate(self.latents):
            tensors |= {f"latent.{i}.{k}": getattr(latent, k) for k in ("z", "mean", "square")}
        return {"tensors": tensors, "record": self._record()}

    def result(self) -> dict[str, Any]:
        """As :meth:`state`, at the end: only what is to be written."""
        return {"tensors": {f"snapshot.{k}": v for k, v in self.snapshot.items()},
                "record": self._record()}  # fmt: skip

    def _record(self) -> dict[str, Any]:
        return {
            "step": self.step, "looks_without_gain": self.looks_without_gain,
            "elapsed": self.elapsed(), "history": self.history, "ended": self.ended,
            "before": vars(self.before), "best": vars(self.best),
        }  # fmt: skip

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Go on from a state that :func:`load_state` has read."""
        self.ended = bool(record.get("ended"))
        if not self.ended:
            self._restore_optimiser(tensors, record)
        marks = {k: v for k, v in tensors.items() if k.startswith("snapshot.")}
        self.snapshot = {k.removeprefix("snapshot."): v for k, v in marks.items()}
        self.step, self.history = record["step"], record["history"]
        self.elapsed_before = record["elapsed"]
        self.looks_without_gain = record["looks_without_gain"]
        self.before, self.best = Held(**record["before"]), Held(**record["best"])

    def _restore_optimiser(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        for i, parameter in enumerate(self._parameters()):
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter.{i}"])
            self.adam.state[parameter] = {
                "step": torch.tensor(float(record["step"])),
                **{k: tensors[f"{k}.{i}"].to(self.device) for k in ("exp_avg", "exp_avg_sq")},
            }
        for i, latent in enumerate(self.latents):
            for key in ("z", "mean", "square"):
                getattr(latent, key).copy_(tensors[f"latent.{i}.{key}"])

    def _state_tensors(self) -> dict[str, Tensor]:
        """Tensors of the names, shapes and dtypes that a state of this run has."""
        wanted = {f"snapshot.{k}": v for k, v in self._snapshot().items()}
        for i, parameter in enumerate(self._parameters()):
            for key in ("parameter", "exp_avg", "exp_avg_sq"):
                wanted[f"{key}.{i}"] = parameter
        for i, latent in enumerate(self.latents):
            wanted |= {f"latent.{i}.{k}": getattr(latent, k) for k in ("z", "mean", "square")}
        return wanted

    def _snapshot(self) -> dict[str, Tensor]:
        """What would be stored of the student as it is now, trained tables included."""
        result = snapshot(self.student)
        for name, table in self._tables().items():
            if table.d is not None:
                result[name] = table(torch.float32).detach().cpu()
        return result

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.adam.param_groups for p in group["params"]]

    def _tables(self) -> dict[str, Any]:
        tables = {"model.embed_tokens.weight": self.student.embeddings}
        if self.student.head is not self.student.embeddings:
            tables["lm_head.weight"] = self.student.head
        return tables

    def _soften(self, place: float) -> None:
        if self.config.codes == "soft":
            tau = self.config.tau * 0.1 ** (place / self.config.steps)
            for latent in self.latents:
                latent.tau = tau

    def _look(self) -> Held:
        for latent in self.latents:  # what is stored is hard, so what is judged is
            latent.tau = 0.0
        return held_out(self.student, self.teacher, self.watched, self.config.micro_batch)

    def _judge(self, held: Held, loss: float) -> bool:
        """Note a look; True when the run should end."""
        if not held.kl < self.best.kl:
            self.looks_without_gain += 1
            self._note(held, loss)
        else:
            self.best, self.looks_without_gain = held, 0
            self._keep(loss)
        return bool(self.config.patience) and self.looks_without_gain >= self.config.patience

    def _keep(self, loss: float) -> None:
        self.snapshot = self._snapshot()
        self._note(self.best, loss)

    def _note(self, held: Held, loss: float) -> None:
        tokens = self.step * self.config.batch_size * self.config.seqlen
        kl = None if math.isnan(loss) else loss
        self.history.append({"step": self.step, "tokens": tokens, "kl": kl, "held_out": vars(held)})
        self.reporter.note(
            f"step {self.step}  {tokens / 1e6:.2f} M tokens  held-out KL {held.kl:.4f}  perplexity "
            f"{held.perplexity:.3f} ({held.ratio:.4f} of full precision)  same top "
            f"{held.same_top:.3f}"
            + (f"  train KL {loss:.4f}" if kl is not None else "")
            + (f"  {self.speed():.0f} tokens/s" if self.seconds else "")
        )

    def _clock(self, began: float) -> None:
        self.seconds += time.monotonic() - began


def schedule(step: float, steps: int, warmup: float) -> float:
    """Factor of the step size: a linear rise over ``warmup`` of the steps, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return min(1.0, (step + 1) / rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def restored_linears(source: Artifact, pattern: str | None) -> set[str]:
    """Names of the ternary linears that get their original weights back.

    Raises:
        PT2Error: the pattern matches none, or all.
    """
    found = {n for n in source.matrices if pattern is not None and re.search(pattern, n)}
    if pattern is not None and len(found) in (0, len(source.matrices)):
        what = "every linear" if found else f"none of {source.path}'s linears"
        raise PT2Error(f"--restore {pattern!r} matches {what}")
    return found


def _tensors(m: TernaryMatrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (torch.from_numpy(m.codes()), torch.from_numpy(m.alpha), torch.from_numpy(m.mu),
            torch.from_numpy(m.perm).long())  # fmt: skip


def _check_names(source: Artifact, out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise PT2Error("--resume and --overwrite exclude each other")
    if out.resolve() == source.path.resolve():
        raise PT2Error(f"{out} is the artifact to be refined: name another folder with -o")
    if out.exists() and not out.is_dir():
        raise PT2Error(f"{out} is a file; name a folder for the artifact")


def _check_output(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to replace what is there, or to forget a state, unless told to."""
    if overwrite or resume:
        return
    if (out / STATE).is_file():
        raise PT2Error(f"{out} holds the state of an unfinished run: use --resume or --overwrite")
    if (out / MANIFEST).exists():
        state = "a complete" if read_manifest(out)["complete"] else "an unfinished"
        raise PT2Error(f"{out} holds {state} artifact already: use --overwrite")


def _run_record(source: Artifact, model: Path, result: Refined) -> dict[str, Any]:
    return {
        "model_dir": str(model.resolve()), "refined_from": str(source.path.resolve()),
        "history": result.history, "seconds": round(result.seconds, 1),
        "tokens_per_second": round(result.tokens_per_second, 1),
        "peak_memory": human_bytes(result.peak_bytes), "codes_changed": result.changed,
    }  # fmt: skip
