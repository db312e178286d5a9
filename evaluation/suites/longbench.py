"""LongBench (arXiv 2308.14508): answers written after long texts, in six categories, with the average of its authors.

Prompts, metrics and versions are those of lm-eval's stock tasks. Cutting a long prompt in its middle, and leaving the
chat template away where examples or code are to be continued, is what the authors' pred.py does.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, JsonValue

from evaluation.bounds import Count
from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import StockTask, stock_task
from evaluation.inference.options import EvalOptions, Progress, part_of
from evaluation.inference.prompts import check_chat_template
from evaluation.naming import did_you_mean, refuse_twice
from evaluation.report import Average, EvalReport, Metric, plain_mean
from evaluation.suite import DataNeed, ModelFacts, SuiteConfig, SuiteData, SuiteResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from evaluation.harness.run_tasks import TaskRun
    from evaluation.samples import Sample

VERSION = 1
IMPORTS = ("evaluation.harness.run_tasks",)

Category = Literal["single_doc_qa", "multi_doc_qa", "summarization", "few_shot", "synthetic", "code"]
Language = Literal["en", "zh"]

TASKS: dict[Category, dict[Language, tuple[str, ...]]] = {
    "single_doc_qa": {"en": ("narrativeqa", "qasper", "multifieldqa_en"), "zh": ("multifieldqa_zh",)},
    "multi_doc_qa": {"en": ("hotpotqa", "2wikimqa", "musique"), "zh": ("dureader",)},
    "summarization": {"en": ("gov_report", "qmsum", "multi_news"), "zh": ("vcsum",)},
    "few_shot": {"en": ("trec", "triviaqa", "samsum"), "zh": ("lsht",)},
    "synthetic": {"en": ("passage_count", "passage_retrieval_en"), "zh": ("passage_retrieval_zh",)},
    "code": {"en": ("lcc", "repobench-p"), "zh": ("lcc", "repobench-p")},
}
"""The 21 tasks by category and language (table 1 of the paper). Code counts in the tables of both languages."""


def _full_name(name: str) -> str:
    """lm-eval's name of a task of LongBench."""
    return f"longbench_{name}"


KNOWN = tuple(dict.fromkeys(_full_name(name) for part in TASKS.values() for names in part.values() for name in names))
"""lm-eval's names of all 21."""

_CONTINUED: tuple[Category, ...] = ("few_shot", "code")
CONTINUED = frozenset(
    _full_name(name) for category in _CONTINUED for names in TASKS[category].values() for name in names
)
"""Never put into a chat template: their prompts end in the middle of what is to be continued (the authors' pred.py)."""

_PACKAGES = ("jieba", "fuzzywuzzy", "rouge")


class Config(SuiteConfig):
    """Which tasks, and how long a prompt may be."""

    categories: tuple[Category, ...] | None = Field(default=None, min_length=1)
    """None for all six. The average is the mean over these."""

    languages: tuple[Language, ...] | None = Field(default=None, min_length=1)
    """None for English, the paper's first table; a category's row is the mean over its tasks in these."""

    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Instead of categories and languages: single tasks by lm-eval's names, such as longbench_qasper. Their report has
    a row for each and no averages."""

    limit: Count | None = None
    """Ask only for the first so many documents of each task."""

    truncation: Literal["middle", "left"] = "middle"
    """middle: a longer prompt keeps its two ends, as LongBench's authors do. left: it keeps its end, which is what
    lm-eval does."""

    max_length: Annotated[Count, Field(ge=2)] | None = None
    """Tokens, as the originals mean it. middle: of the prompt before it is put into the chat template, as in pred.py
    (31500 for models that read 32k, 3500 for 4k). left: of prompt and answer together, as in lm-eval. None: as much as
    the model's context holds beside the answer."""

    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template, those of few_shot and code excepted, as in pred.py."""


def needs(config: Config) -> tuple[DataNeed, ...]:
    """Each task's test split."""
    return tuple(need for name in _names(config) for need in stock_task(name).needs(0))


def check(config: Config) -> None:
    """Raise EvaluationError for a task that LongBench does not have (naming near ones), for one that is named twice,
    for tasks asked in two ways, and if what lm-eval's metrics of LongBench import is not installed."""
    if config.tasks is not None and (config.categories is not None or config.languages is not None):
        raise EvaluationError("longbench is given tasks beside categories or languages; give the one or the other")
    for field in ("tasks", "categories", "languages"):
        refuse_twice(field, getattr(config, field) or ())
    for name in config.tasks or ():
        if name not in KNOWN:
            whole = _full_name(name)
            hint = f"did you mean '{whole}'?" if whole in KNOWN else did_you_mean(name, KNOWN)
            raise EvaluationError(f"LongBench has no task '{name}'; {hint or 'it has ' + ', '.join(KNOWN)}")
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise EvaluationError(
            f"LongBench's metrics need {' and '.join(missing)}, not installed here; pip install {' '.join(_PACKAGES)}"
        )


def check_model(config: Config, facts: ModelFacts) -> None:
    """Raise EvaluationError if the chat template is asked of a tokenizer that has none, or if prompt and answer do not
    fit into the model's context."""
    if config.chat_template:
        check_chat_template(facts.has_chat_template)
    answers = {name: int(stock_task(name).settings["generation_kwargs"]["max_gen_toks"]) for name in _names(config)}
    name = max(answers, key=lambda task: answers[task])
    context = facts.max_position_embeddings
    if config.truncation == "left" and config.max_length is not None:
        if context is not None and config.max_length > context:
            raise EvaluationError(
                f"max_length {config.max_length} is longer than the model's context of {context} tokens"
            )
        context = config.max_length
    if context is None:
        return
    room = context - answers[name]
    if room < 2:
        raise EvaluationError(f"'{name}' writes {answers[name]} tokens, which leaves no room for a prompt in {context}")
    if config.truncation == "middle" and config.max_length is not None and config.max_length > room:
        raise EvaluationError(
            f"max_length {config.max_length} and the {answers[name]} tokens that '{name}' writes are longer than the "
            f"model's context of {context}; set max_length to {room} or less"
        )


def definitions(config: Config) -> tuple[StockTask, ...]:
    """The tasks, as lm-eval defines them."""
    return tuple(stock_task(name) for name in _names(config))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    options: EvalOptions = EvalOptions(),
) -> SuiteResult:
    """Score the tasks: metric "score" of each, in [0, 1], then of each category and "average".

    Averages have no samples of their own. See `harness.run_tasks` for the errors.
    """
    check(config)
    context = getattr(model.config, "max_position_embeddings", None)
    check_model(config, ModelFacts(context, tokenizer.chat_template is not None))
    from evaluation.harness.run_tasks import run_tasks

    metrics: dict[str, Metric] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in _names(config)}
    protocols: list[dict[str, Any]] = []
    for run, progress in _runs(config, options.progress):
        with _quiet_metrics():
            found, asked, protocol = run_tasks(model, tokenizer, data, run, replace(options, progress=progress))
        metrics |= {metric.task: metric for metric in found if metric.metric == "score"}
        for sample in asked:
            samples[sample.task].append(replace(sample, scores={"score": sample.scores["score"]}))
        protocols.append(protocol)
    averages = _averages(config)
    for average in averages:
        metrics[average.task] = plain_mean(average, [metrics[task] for task, _ in average.parts])
    rows = [metrics[name] for name in (*samples, *(average.task for average in averages))]
    protocol = _protocol(config, protocols) | {"generation_config": _generation_config(model)}
    report = EvalReport(suite="longbench", metrics=tuple(rows), protocol=protocol, averages=averages)
    return SuiteResult(report, tuple(sample for each in samples.values() for sample in each))


def _runs(config: Config, progress: Progress) -> Iterator[tuple[TaskRun, Progress]]:
    """The tasks that are put into the chat template, then the others: lm-eval does it for all or for none."""
    from evaluation.harness.run_tasks import TaskRun

    middle = config.truncation == "middle"
    names = _names(config)
    templated = [name for name in names if config.chat_template and name not in CONTINUED]
    done = 0
    for chosen in (templated, [name for name in names if name not in templated]):
        if chosen:
            run = TaskRun(
                names=tuple(chosen),
                definitions=tuple(stock_task(name) for name in chosen),
                num_fewshot=0,
                limit=config.limit,
                chat_template=chosen is templated,
                truncation=config.truncation,
                prompt_length=config.max_length if middle else None,
                max_length=None if middle else config.max_length,
            )
            yield run, part_of(progress, done, done + len(chosen), len(names))
            done += len(chosen)


def _averages(config: Config) -> tuple[Average, ...]:
    """Of each category over its tasks, then over the categories: the Avg of the authors' tables."""
    if config.tasks is not None:
        return ()
    categories = _by_category(config)
    parts = {category: tuple((name, "score") for name in names) for category, names in categories.items()}
    parts["average"] = tuple((category, "score") for category in categories)
    return tuple(Average(task=task, metric="score", parts=part, weighted_by="tasks") for task, part in parts.items())


def _protocol(config: Config, protocols: Sequence[dict[str, Any]]) -> dict[str, JsonValue]:
    """What the runs have in common, and what is LongBench's own."""
    names = _names(config)
    truncated = sum(protocol["truncated_requests"] for protocol in protocols)
    data = sorted({text for protocol in protocols for text in protocol["data"]})
    bare = [name for name in names if name in CONTINUED or not config.chat_template]
    own: dict[str, JsonValue] = {
        "truncated_requests": truncated,
        "data": data,
        "truncation": config.truncation,
        "max_length": {
            "tokens": config.max_length,
            "of": "prompt" if config.truncation == "middle" else "prompt and answer",
        },
        "without_chat_template": [*bare],
        "score": {name: stock_task(name).settings["metric_list"][1]["metric"] for name in names},
        # fuzzywuzzy takes another measure if it finds this library, and scores of code change
        "code_similarity": "Levenshtein" if importlib.util.find_spec("Levenshtein") else "difflib",
    }
    if config.tasks is None:
        own["average"] = "mean over the categories, each the mean over its tasks"
        own["categories"] = {category: list(tasks) for category, tasks in _by_category(config).items()}
        own["languages"] = list(config.languages or ("en",))
    return protocols[0] | {"context": protocols[0]["max_length"]} | own


def _generation_config(model: PreTrainedModel) -> JsonValue:
    """What the model itself brings along; a repetition penalty, for one, changes greedy answers too."""
    own = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    return {key: value for key, value in own.items() if key != "transformers_version" and not key.startswith("_")}


def _names(config: Config) -> tuple[str, ...]:
    return config.tasks or tuple(name for names in _by_category(config).values() for name in names)


def _by_category(config: Config) -> dict[str, tuple[str, ...]]:
    """lm-eval's names of the tasks of each category, once each."""
    languages = config.languages or ("en",)
    chosen = {
        category: [name for each in languages for name in TASKS[category][each]]
        for category in config.categories or TASKS
    }
    return {category: tuple(_full_name(name) for name in dict.fromkeys(names)) for category, names in chosen.items()}


@contextlib.contextmanager
def _quiet_metrics() -> Iterator[None]:
    """Without what the metrics' packages say on stderr: jieba of its dictionary, fuzzywuzzy of a faster library."""
    from evaluation.inference.global_state import ExclusiveGlobals, quiet_logger

    with ExclusiveGlobals(()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("jieba", "fuzzywuzzy.fuzz"):
            importlib.import_module(name)
    with quiet_logger("jieba", logging.WARNING):
        yield
