"""lm-eval's stock tasks on a model in memory. The only file that imports lm_eval.

Prompts, metrics, versions and aggregation are lm-eval's own; `task_overlays` tells it where the data lies. Only the
wanted tasks are indexed, since indexing all of them costs 10 s.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import logging
import math
import random
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.task as lm_task
import lm_eval.evaluator as lm_evaluator
import numpy as np
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import JsonValue

from evaluation.errors import EvaluationError
from evaluation.eval_mode import eval_mode
from evaluation.report import Metric
from evaluation.stock_tasks import StockTask
from evaluation.suite import Progress, SuiteData, silent
from evaluation.task_overlays import write_overlays

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval seeds Python's, numpy's and torch's global generators and prints through global progress bars. One evaluation
# at a time may do that, and everything is put back when it ends.
_ONE_AT_A_TIME = threading.Lock()

# Only metrics without a closed form (a median, a perplexity) are resampled; lm-eval's 100,000 takes minutes for them.
_BOOTSTRAP_ITERS = 1000

_LOADING_SHARE = 0.1


@dataclass(frozen=True)
class TaskRun:
    """What to run: the top-level names to score, and every definition they need (a group's members too).

    `num_fewshot` is passed to all tasks; lm-eval leaves those alone that fix it to 0. `limit` keeps the first so many
    documents of each task;
    `seed` draws few-shot examples.
    """

    names: tuple[str, ...]
    definitions: tuple[StockTask, ...]
    num_fewshot: int
    limit: int | None = None
    seed: int = DEFAULT_OTHER_SEED


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    run: TaskRun,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> tuple[tuple[Metric, ...], dict[str, JsonValue]]:
    """Score the tasks: one metric per task (and group) and metric name, and the protocol.

    Neither the model nor the tokenizer is changed. Raises EvaluationError if a task's data is not where
    `data.folder` says or cannot be loaded, or if lm-eval refuses the task.
    """
    with _ONE_AT_A_TIME, _globals_kept(), tempfile.TemporaryDirectory(prefix="slimline-lm-eval-") as scratch:
        write_overlays(Path(scratch), run.definitions, data, num_fewshot=run.num_fewshot)
        tasks = _load(Path(scratch), run, progress)
        with eval_mode(model):
            lm = _QuietLM(model, tokenizer, batch_size, progress)
            results = lm_evaluator.evaluate(
                lm, task_dict=tasks, limit=run.limit, log_samples=False, bootstrap_iters=_BOOTSTRAP_ITERS
            )
    return _metrics(results), _protocol(run, lm)


class _QuietLM(HFLM):  # type: ignore[misc]
    """HFLM that reports progress instead of drawing bars, and counts the requests it had to cut to fit the model."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress
    ) -> None:
        # HFLM gives the tokenizer a pad token: a copy, since the caller saves its tokenizer beside the checkpoint.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        self.progress = progress
        self.num_truncated = 0
        self._rows, self._expected = 0, 1

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> Any:
        # One forward row serves all requests that differ in the last token only (the A/B/C/D of MMLU).
        self._rows, self._expected = 0, len({(*context, *answer[:-1]) for _, context, answer in requests})
        self.num_truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = super()._model_call(inps, *args, **kwargs)
        self._rows += len(inps)
        share = min(1.0, self._rows / max(1, self._expected))
        self.progress(_LOADING_SHARE + (1 - _LOADING_SHARE) * share, f"{self._rows} of {self._expected} prompts scored")
        return logits


def _load(scratch: Path, run: TaskRun, progress: Progress) -> dict[str, Any]:
    """Build the tasks, which loads their data: lm-eval's {"tasks", "groups", "group_map"}."""
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for done, name in enumerate(run.names):
        progress(_LOADING_SHARE * done / len(run.names), f"loading {name}")
        try:
            part = manager.load([name])
        # Data loading fails in as many ways as there are file formats and networks; the user needs one sentence.
        except Exception as error:
            raise EvaluationError(f"the data of task '{name}' could not be loaded: {error}") from error
        for kind, found in part.items():
            loaded[kind].update(found)
    for task in loaded["tasks"].values():
        # What lm_eval.simple_evaluate does, without its report on the machine, which runs pip for seconds.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=run.num_fewshot)
        task.set_fewshot_seed(seed=run.seed)
    return loaded


def _metrics(results: Mapping[str, Any]) -> tuple[Metric, ...]:
    found = []
    shots: dict[str, int] = results["n-shot"]
    # lm-eval gives a group of groups no n-shot of its own.
    common = next(iter(shots.values())) if len(set(shots.values())) == 1 else None
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr"):
                continue
            if math.isnan(value):
                raise EvaluationError(f"task '{task}' gives NaN for {name}: the model's logits are NaN; prune less")
            found.append(
                Metric(
                    task=task,
                    metric=name if filtered == "none" else key,
                    value=value,
                    stderr=_number(values.get(f"{name}_stderr,{filtered}")),
                    num_fewshot=shots.get(task, common),
                    num_examples=values["sample_len"],
                    task_version=_text(results["versions"].get(task)),
                    higher_is_better=results["higher_is_better"].get(task, {}).get(name) is not False,
                )
            )
    return tuple(found)


def _protocol(run: TaskRun, lm: _QuietLM) -> dict[str, JsonValue]:
    leaves = [task for task in run.definitions if not task.is_group]
    return {
        "lm_eval": importlib.metadata.version("lm-eval"),
        "num_fewshot": run.num_fewshot,
        "limit": run.limit,
        "seeds": {
            "fewshot": run.seed,
            "python": DEFAULT_RANDOM_SEED,
            "numpy": DEFAULT_OTHER_SEED,
            "torch": DEFAULT_OTHER_SEED,
        },
        "bootstrap_iters": _BOOTSTRAP_ITERS,
        "chat_template": None,
        "tokenizer_adds_bos": _adds_bos(lm.tokenizer),
        "max_length": lm.max_length,
        "truncated_requests": lm.num_truncated,
        "dtype": str(lm.model.dtype),
        "data": sorted({f"{task.repo_id}: {task.eval_split}" for task in leaves}),
    }


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    ids: Sequence[int] = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _number(value: Any) -> float | None:
    """lm-eval writes 'N/A' where it has no standard error."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


@contextlib.contextmanager
def _globals_kept() -> Iterator[None]:
    """lm-eval's default seeds and silence inside; the generators, log level and progress bars as before outside."""
    logger = logging.getLogger("lm_eval")
    state = random.getstate(), np.random.get_state(), torch.random.get_rng_state(), logger.level
    bars = lm_task.datasets
    bars_off, tqdm = bars.are_progress_bars_disabled(), lm_task.tqdm
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bars()
    lm_task.tqdm = functools.partial(tqdm, disable=True)
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.random.set_rng_state(state[2])
        logger.setLevel(state[3])
        lm_task.tqdm = tqdm
        if not bars_off:
            bars.enable_progress_bars()
