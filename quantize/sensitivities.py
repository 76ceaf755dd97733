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
import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn

from pt2_core.artifact.folder import Artifact
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
from quantize.model.streamed import EMBEDDING, HEAD, StreamedModel
from quantize.model.torch_setup import arithmetic, pick_device

# Longer windows say no more of a linear and cost more.
MAX_WINDOW = 512
# Relative squared error of the tables' noise: about that of a 3-bit type.
NOISE = 0.01


class _Variants:
    """Residual streams ``[windows, len, hidden]`` by name, kept on the CPU."""

    def __init__(self, model: StreamedModel, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.streams: dict[str, Tensor] = {}

    def forward(self, layer: nn.Module, index: int, name: str, source: str | None = None) -> None:
        """Run a block on stream ``source`` (default: ``name`` itself) and keep it as ``name``."""
        stream = self.streams[source or name]
        parts = [
            self.model.forward_block(layer, batch.to(self.model.device), index).cpu()
            for batch in stream.split(self.batch_size)
        ]
        self.streams[name] = torch.cat(parts)


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
    """Run the ternary model once for every linear.

    Args:
        checkpoint: the model that the artifact was made from.
        tokens: int64 ``[windows, len]``; windows longer than 512 are cut.

    Raises:
        PT2Error: of the model or the artifact.
    """
    reporter = reporter or Reporter()
    tokens = tokens[:, :MAX_WINDOW]
    replaced = {k: torch.from_numpy(v) for k, v in artifact.replaced().items()}
    full = StreamedModel(checkpoint, device, dtype)
    model = StreamedModel(dataclasses.replace(checkpoint, replaced=replaced), device, dtype)
    tied = checkpoint.tied
    variants = _Variants(model, batch_size)
    streams = variants.streams
    streams["full"] = full.embed(tokens).cpu()
    streams["ternary"] = model.embed(tokens).cpu()
    shaken = _shaken_tables(model, tied)
    table = shaken["embedding"].to(model.device, model.dtype)
    streams["embedding"] = nn.functional.embedding(tokens.to(model.device), table).cpu()
    linears: dict[str, Linear] = {}
    total = len(artifact.matrices)
    reporter.start("measuring each linear", total * (model.n_blocks + 1) // 2)
    for index in range(model.n_blocks):
        matrices = artifact.block(index)
        weights = {n: torch.from_numpy(m.dequantize()).to(device) for n, m in matrices.items()}
        layer = model.load_block(index, weights)
        inputs = _inputs(model, layer, streams["ternary"], index, batch_size)
        for name in [n for n in streams if n not in ("full", "ternary")]:
            variants.forward(layer, index, name)
            reporter.step(f"block {index + 1}/{model.n_blocks}")
        for name, weight in weights.items():
            original = model.weight(name)
            moment = inputs[name]
            off = original.double() - weight.double()
            error = float(((off @ moment) * off).sum())
            energy = moment.diagonal().float().cpu().numpy()
            linears[name] = Linear(0.0, error, energy)
            model.replace_weights(layer, index, {name: original})
            variants.forward(layer, index, name, "ternary")
            model.replace_weights(layer, index, {name: weight})
        variants.forward(layer, index, "ternary")
        variants.forward(full.load_block(index), index, "full")
    reporter.done()
    divergence = _divergences(full, model, streams, shaken, tied)
    kl = divergence["ternary"]
    for name, value in linears.items():
        linears[name] = dataclasses.replace(value, gain=kl - divergence[name])
    tables = {n: (divergence[n] - kl) / NOISE for n in (["embedding"] if tied else shaken)}
    return Sensitivity(tokens.numel(), kl, linears, tables)


def _inputs(
    model: StreamedModel, layer: nn.Module, stream: Tensor, index: int, batch_size: int
) -> dict[str, Tensor]:
    """The mean of x x^T at the input of every linear of a block, float64, by module name."""
    sums: dict[int, Tensor] = {}

    def take(number: int, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        product = (x.T @ x).double()
        sums[number] = sums[number] + product if number in sums else product

    for batch in stream.split(batch_size):
        model.capture_inputs(layer, batch.to(model.device), index, take)
    tokens = stream.shape[0] * stream.shape[1]
    return {
        model.linear_name(index, linear): sums[number] / tokens
        for number, site in enumerate(model.adapter.sites)
        for linear in site.linears
    }


def _shaken_tables(model: StreamedModel, tied: bool) -> dict[str, Tensor]:
    """The embeddings, and the head where it is another tensor, with noise on them, float32."""
    generator = torch.Generator().manual_seed(0)
    result = {}
    for key, name in {"embedding": EMBEDDING, **({} if tied else {"head": HEAD})}.items():
        weight = model.checkpoint.read(name).float()
        rows = weight.square().mean(dim=1, keepdim=True).sqrt()
        noise = torch.randn(weight.shape, generator=generator)
        result[key] = weight + noise * rows * NOISE**0.5
    return result


def _divergences(
    full: StreamedModel, model: StreamedModel, streams: dict[str, Tensor],
    shaken: dict[str, Tensor], tied: bool,
) -> dict[str, float]:  # fmt: skip
    """KL(full precision || variant) in nats per token."""
    whole = full.head()
    plain = model.head()
    changed = {HEAD if not tied else EMBEDDING: shaken["embedding" if tied else "head"]}
    replaced = {**model.checkpoint.replaced, **changed}
    noisy = StreamedModel(
        dataclasses.replace(model.checkpoint, replaced=replaced), str(model.device),
        str(model.dtype).removeprefix("torch."),
    ).head()  # fmt: skip
    heads = dict.fromkeys(streams, plain)
    runs = dict(streams)
    if tied:
        heads["embedding"] = noisy
    else:
        runs["head"], heads["head"] = streams["ternary"], noisy
    sums = dict.fromkeys((n for n in runs if n != "full"), 0.0)
    count = 0
    for window in range(streams["full"].shape[0]):
        target = whole(streams["full"][window].to(full.device)).log_softmax(dim=-1)
        count += target.shape[0]
        for name in sums:
            got = heads[name](runs[name][window].to(full.device)).log_softmax(dim=-1)
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
