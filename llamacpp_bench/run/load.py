"""What one call of the timing programs is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from llamacpp_bench.run.machine import usable_cores
from pt2_core.errors import PT2Error
from pt2_core.options import natural, option, positive

SPEED = "speed (llama-bench)"  # the groups of --help
SHORT_TIME = "when time is short"


def numbers(text: str, name: str) -> tuple[int, ...]:
    """`"0,4096"` -> `(0, 4096)`.

    Args:
        name: of the option, for the message.

    Raises:
        PT2Error: something else stands there.
    """
    try:
        found = tuple(int(w) for w in text.split(",") if w.strip())
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise PT2Error(f"{name} {text}: give whole numbers, separated by commas")
    return found


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`"128,256"` -> `((128, 256),)`; `none` -> nothing.

    Raises:
        PT2Error: it is not two lengths.
    """
    if text == "none":
        return ()
    found = numbers(text, "--pg")
    if len(found) != 2 or 0 in found:
        raise PT2Error(f"--pg {text}: give a prompt and a generated length, like 128,256")
    return ((found[0], found[1]),)


@dataclass(frozen=True)
class Load:
    """What is timed, and how the programs run; each field is an option of pt2-bench."""

    prompt: int = option(
        128, "prefill tokens", group=SPEED, flags="-p --prompt", parse=natural, metavar="N"
    )
    gen: int = option(
        256, "decoded tokens", group=SPEED, flags="-n --gen", parse=natural, metavar="N"
    )
    pg: Sequence[tuple[int, int]] | None = option(
        None,
        "prefill and decode timed together; may be repeated (default: those of -p and -n; none "
        "leaves it out)",
        group=SPEED,
        parse=pairs,
        metavar="P,N",
        action="extend",
    )
    depths: tuple[int, ...] = option(
        (0,),
        "tokens already in the KV cache, like 0,4096",
        group=SPEED,
        flags="--depth",
        parse=lambda text: numbers(text, "--depth"),
        metavar="LIST",
    )
    batches: tuple[int, ...] = option(
        (),
        "sequences decoded at once, like 1,8,64 (default: not timed)",
        group=SPEED,
        flags="--batch",
        parse=lambda text: numbers(text, "--batch"),
        metavar="LIST",
    )
    batch_prompt: int | None = option(
        None, "their prompt's length (default: -p)", group=SPEED, parse=natural, metavar="N"
    )
    batch_gen: int | None = option(
        None, "tokens of each (default: -n)", group=SPEED, parse=natural, metavar="N"
    )
    repeats: int = option(
        1,
        "passes of a test in each round, whose mean counts (default: %(default)s); on a GPU the "
        "first records a CUDA graph, which is most of the time of a short prompt",
        group=SPEED,
        parse=positive,
        metavar="N",
    )
    threads: int | None = option(
        None,
        "default: all usable cores",
        group=SPEED,
        flags="-t --threads",
        parse=positive,
        metavar="N",
    )
    gpu_layers: int | None = option(
        None, "default: all on a CUDA build", group=SPEED, parse=natural, metavar="N"
    )
    repack: bool = option(True, "weights stay as they are in the file", group=SPEED)
    tool_timeout: float | None = option(
        None,
        "stop a program that runs longer",
        group=SHORT_TIME,
        parse=positive,
        metavar="S",
    )

    def load(self) -> Load:
        """This load alone, with what follows from something else (None) settled."""
        given = {f.name: getattr(self, f.name) for f in fields(Load)}
        both = ((self.prompt, self.gen),) if self.prompt and self.gen else ()
        given["pg"] = both if self.pg is None else tuple(self.pg)
        given["threads"] = self.threads or usable_cores()
        given["batch_prompt"] = self.prompt if self.batch_prompt is None else self.batch_prompt
        given["batch_gen"] = self.gen if self.batch_gen is None else self.batch_gen
        return Load(**given)

    @property
    def plain(self) -> bool:
        """Whether llama-bench has anything to time."""
        return bool(self.prompt or self.gen or self.pg)

    def arguments(self) -> list[str]:
        """llama-bench's options for this load (no model, no repetitions)."""
        args = ["-p", str(self.prompt), "-n", str(self.gen)]
        for p, n in self.pg or ():
            args += ["-pg", f"{p},{n}"]
        if self.depths != (0,):
            args += ["-d", ",".join(map(str, self.depths))]
        if self.threads is not None:
            args += ["-t", str(self.threads)]
        if self.gpu_layers is not None:
            args += ["-ngl", str(self.gpu_layers)]
        if not self.repack:
            args += ["--repack", "0"]
        return args
