"""lm-eval's stock tasks on a model in memory. The only file that imports lm_eval.

Prompts, metrics, versions and aggregation are lm-eval's own; `overlays` says where the data lies. Only the wanted
tasks are indexed, since indexing all of them costs 10 s.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import logging
import math
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lm_eval.api.task as lm_task
import lm_eval.evaluator as lm_evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import JsonValue
from tqdm import tqdm

from evaluation.errors import EvaluationError
from evaluation.harness.overlays import write_overlays
from evaluation.harness.results import task_metrics, task_samples
from evaluation.harness.stock_tasks import StockTask
from evaluation.inference.eval_mode import eval_mode
from evaluation.inference.generate import generate_until
from evaluation.inference.global_state import ExclusiveGlobals, Setting, seeded_generators
from evaluation.inference.loglikelihood import score_answers
from evaluation.inference.options import EvalOptions, Progress, part_of
from evaluation.inference.prompts import PromptRule, Truncation, adds_bos, check_chat_template
from evaluation.suite import SuiteData

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.report import Metric
    from evaluation.samples import Sample

log = logging.getLogger("slimline")

# Only metrics without a closed form (a median, a perplexity) are resampled; lm-eval's 100,000 takes minutes for them.
_BOOTSTRAP_ITERS = 1000

_LOADING_SHARE = 0.1


@dataclass(frozen=True)
class TaskRun:
    """What to run: the top-level names to score, and every definition they need (a group's members too).

    `num_fewshot` is passed to all tasks; lm-eval leaves those alone that fix it to 0. `limit` keeps the first so many
    documents of each task; `seed` draws few-shot examples. `chat_template` puts prompts into the tokenizer's, each
    few-shot example as a message of its own if `fewshot_as_multiturn`. `truncation` and `prompt_length` are of prompts
    to generate from, see `PromptRule`; contexts of given answers always lose their beginning. `max_length` is
    lm-eval's: tokens of context and answer, None for as many as the model's config allows.
    """

    names: tuple[str, ...]
    definitions: tuple[StockTask, ...]
    num_fewshot: int
    limit: int | None = None
    seed: int = DEFAULT_OTHER_SEED
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    truncation: Truncation = "left"
    prompt_length: int | None = None
    max_length: int | None = None

    @property
    def template_by_lm_eval(self) -> bool:
        """What is cut in its middle is put into the chat template afterwards."""
        return self.chat_template and self.truncation == "left"


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: SuiteData, run: TaskRun, options: EvalOptions
) -> tuple[tuple[Metric, ...], tuple[Sample, ...], dict[str, JsonValue]]:
    """Score the tasks: one metric per task (and group) and metric name, one sample per document, and the protocol.

    Neither the model nor the tokenizer is changed. Threads may call it at once, each with a model of its own: lm-eval's
    own code runs in one at a time, the models run side by side. Logs a warning if few-shot prompts were cut. Raises
    EvaluationError if the tokenizer lacks the chat template that is asked for, if a task's data is not where
    `data.folder` says or cannot be loaded, if lm-eval refuses the task, or if the model's logits are NaN.
    """
    if run.chat_template:
        check_chat_template(tokenizer.chat_template is not None)
    with _lm_eval_globals() as lm_globals, tempfile.TemporaryDirectory(prefix="slimline-lm-eval-") as scratch:
        write_overlays(Path(scratch), run.definitions, data, num_fewshot=run.num_fewshot)
        tasks = _load(Path(scratch), run, data, options.progress)
        with eval_mode(model):
            kinds = {task.OUTPUT_TYPE for task in tasks["tasks"].values()}
            lm = _QuietLM(model, tokenizer, run, options, lm_globals, kinds=kinds)
            results = lm_evaluator.evaluate(
                lm,
                task_dict=tasks,
                limit=run.limit,
                log_samples=True,
                bootstrap_iters=_BOOTSTRAP_ITERS,
                apply_chat_template=run.template_by_lm_eval,
                fewshot_as_multiturn=run.template_by_lm_eval and run.fewshot_as_multiturn,
            )
        # LongBench, where cutting is the protocol, has no few-shot examples of ours
        if run.num_fewshot and lm.num_truncated:
            log.warning(
                "%d requests did not fit into the model's context of %d tokens, and their prompts lost the beginning; "
                "take fewer than %d few-shot examples",
                lm.num_truncated,
                lm.max_length,
                run.num_fewshot,
            )
        return task_metrics(results), task_samples(tasks["tasks"], results["samples"]), _protocol(run, lm)


class _QuietLM(HFLM):  # type: ignore[misc]
    """HFLM that runs its rows through `evaluation.inference.loglikelihood`, reports progress instead of drawing bars,
    and counts the requests it had to cut to fit the model.

    lm_globals: the critical section of lm-eval's own code, which is left while requests are answered. kinds: the output
    types of the tasks; each has its share of the progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        run: TaskRun,
        options: EvalOptions,
        lm_globals: ExclusiveGlobals,
        *,
        kinds: Collection[str],
    ) -> None:
        # HFLM gives the tokenizer a pad token: a copy, since the caller saves its tokenizer beside the checkpoint.
        # Its own batches must not come before ours: one holds whatever it has.
        own = copy.deepcopy(tokenizer)
        super().__init__(pretrained=model, tokenizer=own, batch_size=sys.maxsize, max_length=run.max_length)
        # Long prompts are cut below, and counted; transformers' remark on each would go to standard error.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.num_truncated = 0
        self._run, self._options, self._globals = run, options, lm_globals
        # a multiple choice asks for log-likelihoods
        self._parts = len({"loglikelihood" if kind == "multiple_choice" else kind for kind in kinds})
        self._part = 0
        # The choices of a question share their context, which may be long.
        self._encoded = lru_cache(maxsize=8)(super().tok_encode)

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        encoded: list[int] = self._encoded(string, *args, **kwargs)
        return encoded

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        with self._globals.released():
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
        with self._globals.released():
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        run = self._run
        rule = PromptRule(
            context=self.max_length,
            truncation=run.truncation,
            prompt_length=run.prompt_length,
            chat_template=run.chat_template and not run.template_by_lm_eval,
            add_special_tokens=self.add_bos_token,
        )
        asked = [request.args for request in requests]
        with self._globals.released():
            responses = generate_until(self.model, self.tokenizer, asked, rule, self._next_part())
        self.num_truncated += sum(response.truncated for response in responses)
        for request, response in zip(requests, responses, strict=True):
            # What was asked after cutting is what samples show, and what their hash must tell from another cut.
            request.arguments = (response.prompt, *request.args[1:])
        return [response.text for response in responses]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        options = self._next_part()
        self.num_truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        pairs = [(context, answer) for _, context, answer in requests]
        scores = score_answers(self.model, pairs, options, max_length=self.max_length)
        if any(math.isnan(score.log_likelihood) for score in scores):
            raise EvaluationError("the model's logits are NaN, so no answer can be scored; prune less")
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def _next_part(self) -> EvalOptions:
        """The options of the next kind of requests: its progress is a part of the whole."""
        self._part = min(self._part + 1, self._parts)
        scoring = part_of(self._options.progress, _LOADING_SHARE, 1.0)
        return replace(self._options, progress=part_of(scoring, self._part - 1, self._part, self._parts))


def _load(scratch: Path, run: TaskRun, data: SuiteData, progress: Progress) -> dict[str, Any]:
    """Build the tasks, which loads their data: lm-eval's {"tasks", "groups", "group_map"}."""
    manager = TaskManager(include_path=str(scratch), include_defaults=False)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for done, name in enumerate(run.names):
        progress(_LOADING_SHARE * done / len(run.names), f"loading {name}")
        try:
            part = manager.load([name])
        # Data loading fails in as many ways as there are file formats and networks; the user needs one sentence.
        except Exception as error:
            places = _places(name, run, data)
            raise EvaluationError(f"the data of task '{name}' could not be loaded ({places}): {_why(error)}") from error
        for kind, entries in part.items():
            loaded[kind].update(entries)
    for task in loaded["tasks"].values():
        # What lm_eval.simple_evaluate does, without its report on the machine, which runs pip for seconds.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=run.num_fewshot)
        task.set_fewshot_seed(seed=run.seed)
    return loaded


def _why(error: BaseException) -> str:
    """The last cause: the errors of `datasets` on the way to it only say that there was one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _places(name: str, run: TaskRun, data: SuiteData) -> str:
    """The data sets of a task, or of a group's members, and the folders that stand for them."""
    leaves = [task for task in run.definitions if not task.is_group]
    own = [task for task in leaves if task.name == name] or leaves
    folders = {task.repo_id: data.folder(task.repo_id) for task in own}
    # what stands for a data set may be a link of a name that says nothing to the user
    places = ((repo_id, folder and folder.resolve()) for repo_id, folder in folders.items())
    return "; ".join(f"{repo_id} in {folder}" if folder else repo_id for repo_id, folder in places)


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
        "chat_template": _chat_template(run, lm),
        "tokenizer_adds_bos": adds_bos(lm.tokenizer),
        "max_length": lm.max_length,
        "truncation": run.truncation,
        "truncated_requests": lm.num_truncated,
        "dtype": str(lm.model.dtype),
        "data": sorted({f"{task.repo_id}: {task.eval_split}" for task in leaves}),
    }


def _chat_template(run: TaskRun, lm: _QuietLM) -> JsonValue:
    if not run.chat_template:
        return None
    digest = hashlib.sha256(lm.chat_template(True).encode()).hexdigest()
    return {"sha256": digest, "fewshot_as_multiturn": run.fewshot_as_multiturn}


def _lm_eval_globals() -> ExclusiveGlobals:
    """For lm-eval's own code: its default seeds, no log below errors, no bars."""
    logger, bars = logging.getLogger("lm_eval"), lm_task.datasets
    return ExclusiveGlobals(
        [
            *seeded_generators(python=DEFAULT_RANDOM_SEED, numpy=DEFAULT_OTHER_SEED, torch_cpu=DEFAULT_OTHER_SEED),
            Setting(lambda: logger.level, logger.setLevel, max(logging.ERROR, logger.getEffectiveLevel())),
            Setting(
                bars.are_progress_bars_disabled,
                lambda off: bars.disable_progress_bars() if off else bars.enable_progress_bars(),
                True,
            ),
            Setting(lambda: lm_task.tqdm, partial(setattr, lm_task, "tqdm"), partial(tqdm, disable=True)),
        ]
    )
