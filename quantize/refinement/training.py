"""One training run of a refinement: the student, its optimiser, and the state that was best."""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.matrix import TernaryMatrix
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint, torch_dtype
from pt2_core.progress import Reporter
from pt2_core.upstream import TYPES, grid_of
from quantize.model.student import (
    ScaledNorm,
    build_student,
    build_teacher,
    ternary_maker,
    trainable,
)
from quantize.refinement.config import RefineConfig
from quantize.refinement.distill import Held, Windows, held_out, kl_divergence
from quantize.refinement.state import check_tensors, load_state
from quantize.refinement.store import result_tensors, snapshot


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
        if (grid := grid_of(source.manifest)) in TYPES:
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
