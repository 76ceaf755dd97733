"""Zero-shot tasks through lm-evaluation-harness, for any :class:`pt2_eval.models.Model`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pt2_core.errors import PT2Error
from pt2_eval.models import Model

# The paper's seven, by the harness' names. It reports their plain accuracy ("acc").
PAPER_TASKS = (
    "piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "boolq",
)  # fmt: skip


def zero_shot(
    model: Model, tasks: list[str], *, limit: int | None = None, batch: int = 8,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Run tasks without examples in the prompt.

    Args:
        tasks: the harness' names, or YAML files of one's own (for which the folder is searched).
        limit: the first so many questions of each only.
        batch: sequences of similar length at a time.
        step: called with (done, total) requests.

    Returns:
        task -> {``acc``: ..., ``acc_norm``: ..., their ``..._stderr``, ``questions``}, as far as
        the task has them.

    Raises:
        PT2Error: the harness is not installed, a task is unknown, or its data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise PT2Error("zero-shot tasks need: pip install 'pt2-llm[eval]'") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    files = [Path(t) for t in tasks if t.endswith((".yaml", ".yml"))]
    missing = next((f for f in files if not f.is_file()), None)
    if missing:
        raise PT2Error(f"there is no task file {missing}")
    manager = TaskManager(
        include_path=sorted({str(f.parent.resolve()) for f in files}) or None,
        include_defaults=len(files) < len(tasks),  # reading thousands of files takes 10 s
    )
    names = [_task_name(Path(t)) if Path(t) in files else t for t in tasks]
    unknown = [n for n in names if n not in manager.all_tasks]
    if unknown:
        raise PT2Error(f"lm-evaluation-harness has no task {unknown[0]!r}")
    try:
        found = simple_evaluate(
            _adapter(model, batch, step), tasks=names, num_fewshot=0, limit=limit,
            task_manager=manager, bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
    except PT2Error:
        raise
    except Exception as e:  # a data set that is offline or gone raises nearly anything
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise PT2Error(f"the tasks {', '.join(names)} cannot be run: {first}") from e
    assert found is not None
    samples = found.get("n-samples", {})
    return {
        name: {
            **{k.removesuffix(",none"): v for k, v in found["results"][name].items()
               if isinstance(v, float)},
            "questions": samples.get(name, {}).get("effective", 0),
        }
        for name in names
    }  # fmt: skip


def _task_name(file: Path) -> str:
    import yaml

    class Loader(yaml.SafeLoader):
        """Reads over the harness' own tags (``!function`` and the like)."""

    Loader.add_multi_constructor("!", lambda loader, suffix, node: None)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise PT2Error(f"{file} cannot be read as a task: {e}") from e
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise PT2Error(f"{file} has no line 'task: NAME'")
    return content["task"]


def continuation_scores(
    model: Model, pairs: list[tuple[list[int], list[int]]], batch: int,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:  # fmt: skip
    """Log-probability of each continuation after its context, and whether it is the most likely.

    Sequences that are too long lose their beginning. Those of a batch are filled up on the right,
    which a causal model does not see.

    Args:
        pairs: (context ids, continuation ids), both not empty.
    """
    first = None if model.limit is None else -model.limit - 1
    rows = [(context + rest)[first:-1] for context, rest in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    result: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        tokens = torch.zeros(len(part), len(rows[part[0]]), dtype=torch.int64)
        for place, index in enumerate(part):
            tokens[place, : len(rows[index])] = torch.tensor(rows[index])
        logits = model.logits(tokens)
        for place, index in enumerate(part):
            wanted = torch.tensor(pairs[index][1][-len(rows[index]) :], device=logits.device)
            end = len(rows[index])
            scores = logits[place, end - len(wanted) : end].log_softmax(-1)
            best = bool((scores.argmax(-1) == wanted).all())
            result[index] = (float(scores.gather(1, wanted[:, None]).sum()), best)
        step(min(start + batch, len(order)), len(order))
    return result


def _adapter(model: Model, batch: int, step: Callable[[int, int], None]) -> Any:
    """The harness' view of a model."""
    from lm_eval.api.model import TemplateLM

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return model.bos if model.bos is not None else 0

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            first = [model.bos] if model.bos is not None and add_special_tokens is not False else []
            return first + model.encode(string)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, rest) for _, context, rest in requests]
            return continuation_scores(model, pairs, batch, step)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            raise PT2Error("tasks that score whole texts are not supported; use --text")

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise PT2Error("tasks that generate text are not supported, only multiple choice")

    return Adapter()
