"""Measure what each ternary linear costs the model, for pt2-export's mixed precision.

    python -m quantize.sensitivities MODEL-pt2 --calibration calib.txt
    pt2-export model.gguf --from MODEL-pt2 --target-bpw 2.1

The ternary model and the full-precision one read a few windows of text. For every linear, the
ternary model is run once more with this linear's original weights: by how much its KL divergence
from full precision falls is what a better type for it can gain at most. Embeddings and head are
shaken by a little noise instead. Decoder blocks are streamed: all variants go through a block
together, their activations wait in the CPU's memory. (pt2-quantize --sensitivity N does the same at
the end of a run.)
"""

from __future__ import annotations

from pt2_core.process.stop import until_run_cli

if __name__ == "__main__":
    until_run_cli("quantize.sensitivities")

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.artifact.folder import Artifact
from pt2_core.artifact.manifest import kind_of
from pt2_core.artifact.sensitivity import Linear, Sensitivity, write
from pt2_core.artifact.source import check_made_from
from pt2_core.cli import ArgumentParser, check_threads, run_cli
from pt2_core.errors import PT2Error
from pt2_core.model.checkpoint import Checkpoint
from pt2_core.process.locks import folder_lock
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.tokens import check_context, context_limit
from quantize.calibration import load_calibration
from quantize.config import DEVICES, DTYPES
from quantize.model.block import Block
from quantize.model.streamed import Stream, StreamedModel
from quantize.model.torch_setup import arithmetic, pick_device
from quantize.moments import watch

# Longer windows say no more of a linear and cost more.
MAX_WINDOW = 512
# Relative squared error of the tables' noise: about that of a 3-bit type.
NOISE = 0.01


class _Variants:
    """What each variant's windows are before the next block, kept on the CPU, by name."""

    def __init__(self, model: StreamedModel, base: Stream) -> None:
        self.model, self.base = model, base
        self.states: dict[str, list[Tensor]] = {}

    def add(self, name: str, stream: Stream) -> None:
        """Take windows in, before the first block."""
        self.states[name] = [b.hidden.cpu() for b in stream.batches]

    def forward(self, layer: nn.Module, index: int, name: str, source: str | None = None) -> None:
        """Run a block on the variant ``source`` (default: ``name``) and keep it as ``name``."""
        device = self.model.device
        with torch.no_grad():
            self.states[name] = [
                batch.run(layer, index, state.to(device)).cpu()
                for batch, state in zip(self.base.batches, self.states[source or name], strict=True)
            ]

    def stream(self, name: str) -> Stream:
        """A variant's windows on the model's device."""
        pairs = zip(self.base.batches, self.states[name], strict=True)
        return Stream([replace(b, hidden=s.to(self.model.device)) for b, s in pairs])


def measure(
    artifact: Artifact,
    checkpoint: Checkpoint,
    tokens: Tensor,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 4,
    reporter: Reporter | None = None,
) -> Sensitivity:
    """Run the ternary model once for every linear; once for a kind of linear of all experts.

    Args:
        checkpoint: the model that the artifact was made from.
        tokens: int64 ``[windows, len]``; windows longer than 512 are cut.

    Raises:
        PT2Error: of the model or the artifact.
    """
    reporter = reporter or Reporter()
    tokens = tokens[:, :MAX_WINDOW]
    refined = {k: torch.from_numpy(v) for k, v in artifact.replaced().items()}
    full = StreamedModel(checkpoint, device, dtype)
    model = StreamedModel(replace(checkpoint, replaced=refined), device, dtype)
    noisy = _shaken(model, dtype)
    base = model.start(tokens, batch_size)
    variants = _Variants(model, base)
    variants.add("full", full.start(tokens, batch_size))
    variants.add("ternary", base)
    variants.add("embedding", noisy["embedding"].start(tokens, batch_size))
    linears: dict[str, Linear] = {}
    groups: dict[str, list[str]] = {}
    reporter.start("measuring each linear", len(artifact.matrices) * (model.n_blocks + 1) // 2)
    for index in range(model.n_blocks):
        matrices = artifact.block(index)
        weights = {n: torch.from_numpy(m.dequantize()).to(device) for n, m in matrices.items()}
        block = model.block(index)
        layer = block.module(weights)
        inputs = _inputs(block, layer, variants.stream("ternary"))
        for name in [n for n in variants.states if n not in ("full", "ternary")]:
            variants.forward(layer, index, name)
            reporter.step(f"block {index + 1}/{model.n_blocks}")
        here = _groups(block, list(weights))
        for name, weight in weights.items():
            linears[name] = _linear(block.weight(name) - weight, inputs.get(name))
        for name, members in here.items():
            block.put(layer, {n: block.weight(n) for n in members})
            variants.forward(layer, index, name, "ternary")
            block.put(layer, {n: weights[n] for n in members})
        groups |= here
        variants.forward(layer, index, "ternary")
        variants.forward(full.block(index).module(), index, "full")
    reporter.done()
    divergence = _divergences(full, model, noisy, variants)
    kl = divergence["ternary"]
    for name, members in groups.items():
        whole = sum(linears[n].error for n in members) or 1.0
        for n in members:
            share = linears[n].error / whole if len(members) > 1 else 1.0
            linears[n] = replace(linears[n], gain=(kl - divergence[name]) * share)
    tables = {n: (divergence[n] - kl) / NOISE for n in noisy if n in divergence}
    return Sensitivity(tokens.numel(), kl, linears, tables)


def _groups(block: Block, names: list[str]) -> dict[str, list[str]]:
    """Variants of a block: each matrix, and as one all experts' matrices of a kind.

    A file holds those in one tensor of one type; what the group gains is shared by their errors.
    """
    found: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        matrix = block.matrices[name]
        alone = matrix.expert is None
        found.setdefault((name,) if alone else (matrix.site, kind_of(name)), []).append(name)
    return {members[0]: members for members in found.values()}


def _linear(off: Tensor, moment: Tensor | None) -> Linear:
    """What a matrix's error makes of its inputs; an expert that no token reached makes nothing."""
    if moment is None:
        return Linear(0.0, 0.0, torch.ones(off.shape[1]).numpy())
    off = off.double()
    error = float(((off @ moment) * off).sum())
    return Linear(0.0, error, moment.diagonal().float().cpu().numpy())


@torch.no_grad()
def _inputs(block: Block, layer: nn.Module, stream: Stream) -> dict[str, Tensor]:
    """The mean over all tokens of x x^T at the input of every matrix of a block, float64, by name.

    An expert's input is 0 for the tokens that are not routed to it.
    """
    sums: dict[tuple[int, int | None], Tensor] = {}
    wanted = range(len(block.sites))
    tokens = 0
    for batch in stream.batches:
        tokens += batch.tokens.numel()
        seen, _ = watch(
            layer, block.sites, wanted, partial(batch.run, layer, block.index)
        )  # fmt: skip
        inputs: list[tuple[tuple[int, int | None], Tensor]] = [
            ((n, None), x) for n, x in seen.inputs.items()
        ]
        inputs += [((n, e), x) for n, each in seen.experts.items() for e, x in each.items()]
        for key, x in inputs:
            x = x.reshape(-1, x.shape[-1]).float()
            product = (x.T @ x).double()
            sums[key] = sums[key] + product if key in sums else product
    return {
        m.name: sums[m.site, m.expert] / tokens
        for m in block.matrices.values()
        if (m.site, m.expert) in sums
    }


def _shaken(model: StreamedModel, dtype: str) -> dict[str, StreamedModel]:
    """Models with noise on the embeddings, and on the head where it is another tensor."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for key, name in {"embedding": model.embedding, "head": model.head}.items():
        if key == "head" and name == model.embedding:
            continue
        weight = model.checkpoint.read(name).float()
        rows = weight.square().mean(dim=1, keepdim=True).sqrt()
        noise = torch.randn(weight.shape, generator=generator)
        shaken = {**model.checkpoint.replaced, name: weight + noise * rows * NOISE**0.5}
        checkpoint = replace(model.checkpoint, replaced=shaken)
        result[key] = StreamedModel(checkpoint, str(model.device), dtype)
    return result


def _divergences(
    full: StreamedModel, model: StreamedModel, noisy: dict[str, StreamedModel], variants: _Variants
) -> dict[str, float]:
    """KL(full precision || variant) in nats per token."""
    runs = {n: (model, n) for n in variants.states if n != "full"}
    tied = "head" not in noisy
    if tied:
        runs["embedding"] = (noisy["embedding"], "embedding")
    else:
        runs["head"] = (noisy["head"], "ternary")
    sums = dict.fromkeys(runs, 0.0)
    count = 0
    streams = {n: variants.stream(n).batches for n in variants.states}
    with ExitStack() as held, torch.no_grad():
        for each in (full, model, *noisy.values()):
            held.enter_context(each.outside())
        for at, batch in enumerate(streams["full"]):
            targets = [t.log_softmax(dim=-1) for t in full.logits(Stream([batch]))]
            count += sum(t.shape[0] for t in targets)
            for name, (head, states) in runs.items():
                found = head.logits(Stream([streams[states][at]]))
                for logits, target in zip(found, targets, strict=True):
                    got = logits.log_softmax(dim=-1)
                    sums[name] += float(
                        nn.functional.kl_div(got, target, log_target=True, reduction="sum").double()
                    )
    if not all(abs(v) < float("inf") for v in sums.values()):
        raise PT2Error("the model's logits are NaN or Inf: use --dtype float32")
    return {name: value / count for name, value in sums.items()}


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m quantize.sensitivities``."""
    head, _, rest = __doc__.partition("\n\n")
    parser = ArgumentParser(
        prog="python -m quantize.sensitivities", description=head, epilog="examples:\n" + rest
    )
    parser.add_argument("artifact", help="folder of a complete artifact")
    parser.add_argument("--model", help="the source model (default: what it was made from)")
    parser.add_argument("--calibration", required=True, help="as for pt2-quantize")
    parser.add_argument("--text-field", metavar="NAME", help="of JSON records")
    parser.add_argument("--allow-long", action="store_true", help="windows beyond the context")
    parser.add_argument("--windows", type=int, default=8, help="of text (8)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window (512)")
    parser.add_argument("--seed", type=int, default=0, help="of the windows (0)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(argv)
    return run_cli(
        "quantize.sensitivities", lambda: _run(args), lower="--batch-size, --windows or --seqlen"
    )


def _run(args: argparse.Namespace) -> int:
    given = vars(args)
    if min(given["windows"], given["batch_size"]) < 1 or not 2 <= given["seqlen"] <= MAX_WINDOW:
        raise PT2Error(f"--windows must be at least 1, --seqlen in 2 to {MAX_WINDOW}")
    check_threads(given["threads"])
    # The lock first: what is measured must be what is there when it is written.
    with folder_lock(Artifact.open(given["artifact"]).path), open_reporter() as reporter:
        artifact, result = _measured(given, reporter)
        path = write(artifact, result)
    print(summary(result))
    print(f"written  {path}")
    return 0


def _measured(given: dict[str, Any], reporter: Reporter) -> tuple[Artifact, Sensitivity]:
    """The artifact that the options name, and what was measured of it."""
    artifact = Artifact.open(given["artifact"])
    source = artifact.source_model(given["model"], "--model")
    checkpoint = Checkpoint.open(source)
    check_made_from(artifact, checkpoint)
    check_context(
        given["seqlen"], context_limit(checkpoint.raw_config), checkpoint.path.name, "--seqlen",
        allow=given["allow_long"], warn=reporter.warn,
    )  # fmt: skip
    with arithmetic(given["threads"]):
        device = pick_device(given["device"])
        vocab = StreamedModel(checkpoint).config.vocab_size
        text = load_calibration(
            given["calibration"], checkpoint.path, samples=given["windows"], vocab=vocab,
            seqlen=given["seqlen"], seed=given["seed"], bos=False, text_field=given["text_field"],
        )  # fmt: skip
        for note in text.notes:
            reporter.note(note)
        result = measure(
            artifact, checkpoint, text.tokens, device=device, dtype=given["dtype"],
            batch_size=given["batch_size"], reporter=reporter,
        )  # fmt: skip
    return artifact, result


def summary(result: Sensitivity) -> str:
    """What the ternary model loses, and the linears that have the largest part in it."""
    ranked = sorted(result.linears.items(), key=lambda item: -item[1].gain)[:5]
    most = ", ".join(f"{name.removeprefix('model.')} {v.gain:.4f}" for name, v in ranked)
    return (
        f"KL divergence of the ternary model {result.kl:.4f} nats per token ({result.tokens} "
        f"tokens); restored alone, these gain the most: {most}"
    )


if __name__ == "__main__":
    sys.exit(main())
