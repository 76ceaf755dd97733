"""Text that a model writes itself, to refine its ternary form on where there is little other text.

    python -m quantize.refinement.selftext MODEL -o own.safetensors --tokens 4000000 --device cuda
    python -m quantize.refinement.selftext MODEL -o own.safetensors --prompts calib.txt
    --prompt-tokens 32 pt2-refine MODEL-pt2 --text own.safetensors:train

Every row is sampled at temperature 1 from the model's own next-token distribution, after BOS or
after the first tokens of a window of --prompts. To the distillation such text is as good as new
text of the model's own training: what the student should imitate is the distribution itself.
(Liu et al., LLM-QAT, 2023, train on a model's own text in the same spirit.)
"""

from __future__ import annotations

from pt2_core.process.stop import until_run_cli

if __name__ == "__main__":
    until_run_cli("quantize.refinement.selftext")

import quantize.model.waiting  # noqa: F401  before torch is loaded

# isort: split

import shlex
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pt2_core.cli import ArgumentParser, run_cli
from pt2_core.errors import PT2Error
from pt2_core.files import atomic_path
from pt2_core.model.checkpoint import Checkpoint, torch_dtype
from pt2_core.progress import Reporter, open_reporter
from pt2_core.texts.tokens import check_context, context_limit, refuse_degenerate_tokens, stream
from quantize.config import DEVICES, DTYPES
from quantize.model.streamed import StreamedModel
from quantize.model.student import Network, build_teacher, check_trainable
from quantize.model.torch_setup import arithmetic, pick_device

# Not cuDNN's, which prepares itself anew for every length, and here every step has another one.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def write_text(
    model: Network, prompts: Tensor, length: int, seed: int, reporter: Reporter | None = None
) -> Tensor:
    """Continue prompts by sampling at temperature 1.

    Args:
        prompts: int64 ``[n, p]`` on the model's device, p at least 1.
        length: tokens per row in the end, prompt and all.

    Returns:
        int64 ``[n, length]``
    """
    reporter = reporter or Reporter()
    generator = torch.Generator(prompts.device).manual_seed(seed)
    rows, cache, now = [prompts], None, prompts
    table, head = model.embeddings(model.dtype), model.head_weight()
    model.body.eval()
    for _ in range(length - prompts.shape[1]):
        x = functional.embedding(now, table)
        with sdpa_kernel(ATTENTION):
            out = model.body(inputs_embeds=x, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        chances = torch.softmax((out.last_hidden_state[:, -1] @ head.T).float(), dim=-1)
        now = torch.multinomial(chances, 1, generator=generator)
        rows.append(now)
        reporter.step()
    return torch.cat(rows, dim=1)


def prompt_windows(ids: Tensor, count: int, width: int, seed: int) -> Tensor:
    """``count`` windows of ``width`` tokens at random places of a stream ``[n]``."""
    if ids.shape[0] < width:
        raise PT2Error(f"the prompts' text has {ids.shape[0]} tokens, fewer than {width}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(ids.shape[0] - width + 1, (count, 1), generator=generator)
    return ids[starts + torch.arange(width)]


def main(argv: list[str] | None = None) -> int:
    """The command ``python -m quantize.refinement.selftext``."""
    parser = ArgumentParser(
        prog="python -m quantize.refinement.selftext", description=__doc__.split("\n\n")[0],
        epilog="examples:\n" + "\n\n".join(__doc__.split("\n\n")[1:]),
    )  # fmt: skip
    parser.add_argument("model", help="folder of the Hugging Face model")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="how many (1000000)")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row (512)")
    parser.add_argument("--batch", type=int, default=64, help="rows written at a time (64)")
    parser.add_argument("--prompts", help="text to take beginnings from (default: BOS alone)")
    parser.add_argument("--text-field", metavar="NAME", help="of the prompts' JSON records")
    parser.add_argument("--allow-long", action="store_true", help="rows beyond the context")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each beginning (32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args(argv)

    def body() -> int:
        if min(args.tokens, args.batch, args.prompt_tokens) < 1 or args.length < 2:
            raise PT2Error("--tokens, --batch and --prompt-tokens must be at least 1, --length 2")
        if args.prompts and args.prompt_tokens >= args.length:
            raise PT2Error("--prompt-tokens must be below --length")
        if args.text_field and not args.prompts:
            raise PT2Error("--text-field belongs to --prompts")
        with open_reporter() as reporter:
            ids = _generate(args, reporter)
        with atomic_path(args.out) as tmp:
            save_file({"train": ids}, tmp)
        text = shlex.quote(f"{args.out}:train")
        print(f"{ids.numel()} tokens in {args.out}; use them with --text {text}")
        return 0

    return run_cli("quantize.refinement.selftext", body, lower="--batch or --length")


def _generate(args: object, reporter: Reporter) -> Tensor:
    a = vars(args)
    checkpoint = Checkpoint.open(a["model"])
    check_context(
        a["length"], context_limit(checkpoint.raw_config), checkpoint.path.name, "--length",
        allow=a["allow_long"], warn=reporter.warn,
    )  # fmt: skip
    device, dtype = pick_device(a["device"]), a["dtype"]
    streamed = StreamedModel(checkpoint, device, dtype)
    check_trainable(streamed.shell.model)
    config = streamed.config
    count = -(-a["tokens"] // a["length"])
    if a["prompts"]:
        text = stream(
            a["prompts"], checkpoint.path, config.vocab_size, wanted=count * a["prompt_tokens"],
            text_field=a["text_field"],
        )  # fmt: skip
        for note in text.notes:
            reporter.note(note)
        refuse_degenerate_tokens(text.ids, a["prompts"])
        prompts = prompt_windows(text.ids, count, a["prompt_tokens"], a["seed"])
    elif isinstance(config.bos_token_id, int):
        prompts = torch.full((count, 1), config.bos_token_id)
    else:
        raise PT2Error(f"{checkpoint.path} has no BOS token to begin with: give --prompts TEXT")
    parts = []
    with arithmetic(0):
        model = build_teacher(
            config, checkpoint.read, device, torch_dtype(dtype), tied=checkpoint.tied
        )
        batches = prompts.split(a["batch"])
        reporter.start("writing", len(batches) * (a["length"] - prompts.shape[1]), "steps", every=5)
        for number, batch in enumerate(batches):
            seed = a["seed"] * 1_000_003 + number
            rows = write_text(model, batch.to(device), a["length"], seed, reporter)
            parts.append(rows.to("cpu", torch.int32))
        reporter.done()
    return torch.cat(parts)


if __name__ == "__main__":
    sys.exit(main())
