"""Hold a GGUF file against its artifact's proof, in the llama.cpp that is to run it.

Two programs that every llama.cpp build has are enough: llama-perplexity runs the proof's windows
and saves its predictions, llama-tokenize the proof's lines. A file is right when its predictions
are close to the ternary model's and its tokens are the model's own.

Two limits decide. Activations in 8 bits cost a right file some 0.0005 to 0.004 nats per token on
every model measured (docs/proof.md); a wrong one is off by much more. What a file rounds on
purpose (embeddings and head in 4 to 6 bits, Q2_K's scales, linears in K-quants) can cost more than
that: the proof is then made anew with the file's own values of just these tensors, and compared
once more.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pt2_core.artifact.proof import F32, I32, Difference, Proof, difference, scored
from pt2_core.artifact.proof_text import AFTER_SPECIAL, DECOMPOSED
from pt2_core.errors import PT2Error
from pt2_core.process import children
from pt2_core.process.temporary import temporary_folder

MAX_KL = 0.01
MIN_SAME_TOP = 0.75
PERPLEXITY, TOKENIZE = "llama-perplexity", "llama-tokenize"
_MAGIC = b"_logits_"
WORDLESS_TRIES, WORDLESS_SECONDS = 30, 20.0
# Lines that llama.cpp is known to take apart otherwise, where a tokenizer does what it does not.
KNOWN_GAPS = {
    DECOMPOSED: "llama.cpp composes no letters (Unicode NFC), this tokenizer does",
    AFTER_SPECIAL: "llama.cpp puts a space before a word there, this tokenizer does not",
}


class Programs(Protocol):
    """A llama.cpp build: where its programs are, and the environment in which they run."""

    def tool(self, name: str) -> Path: ...

    def env(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Verdict:
    """What the proof says of a file.

    Attributes:
        difference: of the predictions.
        lines: how many lines were tokenised.
        gaps: line -> known reason why its tokens differ.
        renewed: what was made anew with the file's own values, in words; empty: nothing.
        problem: why the file is refused; None: it is right.
    """

    difference: Difference
    lines: int
    gaps: Mapping[str, str]
    renewed: str = ""
    problem: str | None = None

    def line(self) -> str:
        """One line with the figures."""
        d = self.difference
        text = (
            f"KL {d.kl:.4f} nats per token and {d.same_top:.1%} equal top tokens over "
            f"{d.positions} positions; tokens of {self.lines - len(self.gaps)} of {self.lines} "
            "texts equal"
        )
        if self.renewed:
            text += f" (against the model with the file's {self.renewed})"
        return text

    def notes(self) -> list[str]:
        """Known gaps of llama.cpp that this model meets, in words."""
        return [f"tokens of {name}: {why}" for name, why in self.gaps.items()]


@dataclass(frozen=True)
class Folder:
    """The programs of any llama.cpp build, in one folder."""

    path: Path

    def tool(self, name: str) -> Path:
        """The program's path.

        Raises:
            PT2Error: the folder has none of this name.
        """
        for found in (self.path / name, self.path / f"{name}.exe", self.path / "bin" / name):
            if os.access(found, os.X_OK):
                return found
        raise PT2Error(f"{self.path} has no program {name}: give the folder of a llama.cpp build")

    def env(self) -> dict[str, str]:
        """The current environment."""
        return dict(os.environ)


def check_file(
    file: Path,
    proof: Proof,
    programs: Programs,
    *,
    gaps: Mapping[str, str],
    renew: Callable[[], tuple[Proof, str] | None] = lambda: None,
    hint: str = "",
) -> Verdict:
    """Run a proof's windows and lines through llama.cpp, and judge.

    Args:
        file: the GGUF file, or the first of its splits.
        gaps: lines whose tokens are known to differ -> why.
        renew: makes the proof anew with the file's own values of what it rounds, and says what
            that is; None where there is nothing of the kind. Called only when it is needed.
        hint: what is unusual about the model, for the message.

    Raises:
        PT2Error: llama.cpp cannot load or run the file; its words are in the message.
    """
    with temporary_folder(Path(tempfile.gettempdir()), "pt2-proof-") as folder:
        # llama-perplexity first: it says why it cannot load a file, llama-tokenize does not.
        saved = run_windows(file, proof, programs, folder)
        differing = different_lines(file, proof, programs, folder)
        tokens, values = read_predictions(saved)
        measured = difference(proof, *predictions(values, proof))
        verdict = Verdict(measured, len(proof.lines), {n: gaps[n] for n in differing if n in gaps})
        wrong = next((n for n in differing if n not in gaps), None)
        if wrong is not None:
            return replace(verdict, problem=differing[wrong])
        if not np.array_equal(tokens, proof.tokens):
            return replace(verdict, problem=first_difference("plain prose", proof.tokens, tokens))
        if fits(measured):
            return verdict
        renewed = renew()
        if renewed is not None:
            anew, what = renewed
            measured = difference(anew, *predictions(values, anew))
            verdict = replace(verdict, difference=measured, renewed=what)
    return verdict if fits(measured) else replace(verdict, problem=reason(measured, hint))


def fits(d: Difference) -> bool:
    """Whether predictions are as close as a right file's."""
    return d.kl <= MAX_KL and d.same_top >= MIN_SAME_TOP


def reason(d: Difference, hint: str) -> str:
    """What is likely to be wrong with a file whose predictions are others."""
    what = (
        f"its predictions are not the ternary model's (KL {d.kl:.3f} nats per token, at most "
        f"{MAX_KL}; {d.same_top:.0%} equal top tokens, at least {MIN_SAME_TOP:.0%})"
    )
    if d.early <= MAX_KL < d.late:
        what += (
            f": right near the beginning of a window (KL {d.early:.4f}) and wrong towards its end "
            f"({d.late:.3f}), as with a sliding window or rope setting that llama.cpp does not have"
        )
    return f"{what}; {hint}" if hint else what


def different_lines(file: Path, proof: Proof, programs: Programs, folder: Path) -> dict[str, str]:
    """Lines whose tokens in llama.cpp are not the model's own -> what differs.

    The first line holds those that no tokenizer is known to differ in, so that a right file needs
    few runs; the single ones are looked at when it differs.
    """
    result: dict[str, str] = {}
    for number, ((name, text), ids) in enumerate(zip(proof.lines, proof.ids, strict=True)):
        alone = number == 0 or name in KNOWN_GAPS
        if not alone and proof.lines[0][0] not in result:
            continue
        got = tokenise(file, text, programs, folder)
        if not np.array_equal(got, ids):
            result[name] = first_difference(f"the text {name!r}", ids, got)
    if len(result) > 1:
        result.pop(proof.lines[0][0], None)  # a single line names it better
    return result


def first_difference(what: str, ours: I32, theirs: I32) -> str:
    """Where two rows of token ids part, in words."""
    ours, theirs = ours.ravel(), theirs.ravel()
    common = min(len(ours), len(theirs))
    apart = np.flatnonzero(ours[:common] != theirs[:common])
    at = int(apart[0]) if len(apart) else common
    shown = [" ".join(map(str, x[at : at + 4])) or "nothing" for x in (ours, theirs)]
    return (
        f"llama.cpp makes other tokens of {what} than the model's own tokenizer: from token {at} "
        f"on {shown[1]} in place of {shown[0]}"
    )


def tokenise(file: Path, text: str, programs: Programs, folder: Path) -> I32:
    """llama.cpp's token ids of a text, special tokens in it recognised, nothing in front."""
    given = folder / "line.txt"
    given.write_bytes(text.encode())
    done = _run(
        programs, TOKENIZE, "-m", file, "-f", given, "--ids", "--no-bos", "--no-escape",
        "--log-disable",
    )  # fmt: skip
    try:
        ids = json.loads(done.stdout[done.stdout.rindex("[") :])
        return np.array(ids, np.int32)
    except (ValueError, TypeError, OverflowError) as e:
        raise PT2Error(f"{TOKENIZE} printed no token ids for {file}") from e


def run_windows(file: Path, proof: Proof, programs: Programs, folder: Path) -> Path:
    """Run a proof's windows; returns the file with llama-perplexity's saved predictions."""
    text, saved = folder / "windows.txt", folder / "predictions"
    text.write_bytes(proof.text.encode())
    length = str(proof.length)
    _run(
        programs, PERPLEXITY, "-m", file, "-f", text, "-c", length, "-b", length,
        "--chunks", len(proof.tokens), "--save-all-logits", saved,
        "--override-kv", "tokenizer.ggml.add_eos_token=bool:false",
    )  # fmt: skip
    return saved


def read_predictions(saved: Path) -> tuple[I32, NDArray[np.uint16]]:
    """What llama-perplexity has saved.

    Returns:
        token ids int32 ``[windows, length]``, and the coded log-probabilities, mapped from the
        file, uint16 ``[windows, scored, 4 + vocab (+ 1)]``; see :func:`predictions`.

    Raises:
        PT2Error: it has not saved what it was asked for.
    """
    try:
        with saved.open("rb") as f:
            head = f.read(20)
            length, vocab, windows = np.frombuffer(head[8:], "<i4").tolist()
            tokens = np.frombuffer(f.read(4 * windows * length), "<i4").reshape(windows, length)
        row = 2 * ((vocab + 1) // 2) + 4
        shape = (windows, scored(length), row)
        values = np.memmap(saved, "<u2", "r", offset=20 + tokens.nbytes, shape=shape)
    except (OSError, ValueError) as e:
        raise PT2Error(f"{PERPLEXITY} did not save its predictions ({e})") from e
    if head[:8] != _MAGIC:
        raise PT2Error(f"{PERPLEXITY} saved its predictions in another format")
    return tokens.astype(np.int32), values


def predictions(values: NDArray[np.uint16], proof: Proof) -> tuple[F32, I32]:
    """Log-probabilities of a proof's top tokens, float32 ``[windows, scored, k]``, and the most
    likely tokens, int32 ``[windows, scored]``.

    A row begins with a scale and the least log-probability, two floats in four places; a token's
    is ``scale * value + least``.
    """
    logprob = np.empty(proof.top.shape, np.float32)
    best = np.empty(proof.top.shape[:2], np.int32)
    for window, (rows, top) in enumerate(zip(values, proof.top, strict=True)):
        head = np.ascontiguousarray(rows[:, :4]).view("<f4")
        coded = np.take_along_axis(rows[:, 4:], top, axis=1).astype(np.float32)
        logprob[window] = coded * head[:, :1] + head[:, 1:]
        # Several tokens may share the highest value: the proof's own top token is among them then.
        highest = rows[:, 4:].max(axis=1)
        first = rows[:, 4:].argmax(axis=1)
        same = np.take_along_axis(rows[:, 4:], top[:, :1], axis=1)[:, 0] == highest
        best[window] = np.where(same, top[:, 0], first)
    return logprob, best


def _run(programs: Programs, tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(programs.tool(tool)), *map(str, arguments)]
    began = time.monotonic()
    # llama.cpp can exit before its log's thread has said why it fails, on a busy machine every
    # other time. What fails at loading fails at once, so that asking again costs little.
    for _ in range(WORDLESS_TRIES):
        done = children.run(command, env=programs.env())
        said = done.stdout.strip() or done.stderr.strip()
        if done.returncode == 0 or said or time.monotonic() - began > WORDLESS_SECONDS:
            break
    if done.returncode:
        raise PT2Error(f"llama.cpp cannot use the file: {_words(tool, done)}")
    return done


def _words(tool: str, done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"{tool} was ended by {signal.Signals(-done.returncode).name}"
    lines = [x.strip() for x in (done.stderr + done.stdout).splitlines() if x.strip()]
    telling = [x for x in lines if re.search("error|failed|invalid|missing|cannot", x, re.I)]
    words = (telling or lines or [f"exit status {done.returncode}"])[0]
    return f"{tool}: {re.sub(r'^[0-9.]+ [A-Z] ', '', words)[:300]}"
