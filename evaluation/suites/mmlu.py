"""MMLU (arXiv 2009.03300): 57 subjects, five-shot, with lm-eval's averages of the four categories and of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from evaluation.bounds import Amount, Count
from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import StockTask, mmlu_tasks
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import check_chat_template
from evaluation.naming import did_you_mean, refuse_twice
from evaluation.report import Average, EvalReport, Metric
from evaluation.suite import DataNeed, ModelFacts, SuiteConfig, SuiteData, SuiteResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 2
IMPORTS = ("evaluation.harness.run_tasks",)


class Config(SuiteConfig):
    """Which subjects, and how they are asked."""

    subjects: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Such as "anatomy" or "high_school_physics"; None for all 57."""

    num_fewshot: Amount = Field(default=5, le=5)
    """Examples before each question: the first of the subject's dev split, which has five."""

    limit: Count | None = None
    """Score only the first so many questions of each subject."""

    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template, as lm-eval's --apply_chat_template does."""

    fewshot_as_multiturn: bool = True
    """With chat_template: each example is a question and an answer of the conversation, not one long turn."""


def needs(config: Config) -> tuple[DataNeed, ...]:
    """Each subject's test split, and its dev split if examples are asked for."""
    return tuple(need for task in _subjects(config) for need in task.needs(config.num_fewshot))


def check(config: Config) -> None:
    """Raise EvaluationError if lm-eval, or its MMLU, is not installed, for a subject that MMLU does not have (naming
    near ones) and for one that is named twice."""
    known = [_subject(task) for task in mmlu_tasks() if not task.is_group]
    for name in config.subjects or ():
        if name not in known:
            hint = did_you_mean(name, known) or f"there are {', '.join(sorted(known))}"
            raise EvaluationError(f"MMLU has no subject '{name}'; {hint}")
    refuse_twice("subjects", config.subjects or ())


def check_model(config: Config, facts: ModelFacts) -> None:
    """Raise EvaluationError if the chat template is asked of a tokenizer that has none."""
    if config.chat_template:
        check_chat_template(facts.has_chat_template)


def definitions(config: Config) -> tuple[StockTask, ...]:
    """The groups and the subjects, as lm-eval defines them."""
    return (*(task for task in mmlu_tasks() if task.is_group), *_subjects(config))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    options: EvalOptions = EvalOptions(),
) -> SuiteResult:
    """Score the subjects, tasks "mmlu_<subject>".

    Tasks "mmlu_humanities", "mmlu_social_sciences", "mmlu_stem" and "mmlu_other" are the averages of the categories,
    "mmlu" of all, weighted by questions; each is there only if all its subjects were asked. A part of the subjects has
    its average as "mmlu_<number>_subjects". Averages have no samples of their own. See `harness.run_tasks` for the
    errors.
    """
    check(config)
    from evaluation.harness.run_tasks import TaskRun, run_tasks

    run = TaskRun(
        names=_names(config),
        definitions=definitions(config),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        chat_template=config.chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
    )
    metrics, samples, protocol = run_tasks(model, tokenizer, data, run, options)
    averages = [
        Average(task=task, metric="acc", parts=tuple((name, "acc") for name in names), weighted_by="items")
        for task, names in _averaged(config).items()
    ]
    known = {metric.task for metric in metrics}
    # lm-eval knows no average of a part of the subjects
    metrics += tuple(subject_average(average, metrics) for average in averages if average.task not in known)
    protocol["subjects"] = None if config.subjects is None else list(config.subjects)
    return SuiteResult(EvalReport(suite="mmlu", metrics=metrics, protocol=protocol, averages=tuple(averages)), samples)


def subject_average(average: Average, metrics: Sequence[Metric]) -> Metric:
    """The mean over the questions of some subjects, its standard error from their pooled variance as lm-eval does it
    for its groups: the sum of n(n-1)se^2 over N minus the number of subjects, divided by N, under the root."""
    tasks = {task for task, _ in average.parts}
    chosen = [metric for metric in metrics if metric.task in tasks]
    sizes = [metric.num_examples or 0 for metric in chosen]
    total = sum(sizes)
    errors = [metric.stderr for metric in chosen if metric.stderr is not None]
    stderr = None
    if len(errors) == len(chosen):
        pooled = math.fsum(size * (size - 1) * error**2 for size, error in zip(sizes, errors, strict=True))
        stderr = math.sqrt(pooled / (total - len(chosen)) / total)
    return Metric(
        task=average.task,
        metric=average.metric,
        value=math.fsum(size * metric.value for size, metric in zip(sizes, chosen, strict=True)) / total,
        stderr=stderr,
        num_fewshot=chosen[0].num_fewshot,
        num_examples=total,
        higher_is_better=True,
    )


def _subjects(config: Config) -> list[StockTask]:
    leaves = [task for task in mmlu_tasks() if not task.is_group]
    return [task for task in leaves if config.subjects is None or _subject(task) in config.subjects]


def _names(config: Config) -> tuple[str, ...]:
    """What lm-eval is to load: "mmlu" if all subjects are asked for, else the complete categories and the rest."""
    asked = [task.name for task in _subjects(config)]
    categories = _categories()
    complete = [category for category, names in categories.items() if set(names) <= set(asked)]
    if len(complete) == len(categories):
        return ("mmlu",)
    covered = {name for category in complete for name in categories[category]}
    return (*complete, *(name for name in asked if name not in covered))


def _averaged(config: Config) -> dict[str, list[str]]:
    """Tasks by the row that averages them; last the row of all that is asked for."""
    asked = [task.name for task in _subjects(config)]
    names = _names(config)
    if names == ("mmlu",):
        return _categories() | {"mmlu": asked}
    complete = {category: members for category, members in _categories().items() if category in names}
    return complete | ({f"mmlu_{len(asked)}_subjects": asked} if len(asked) > 1 else {})


def _categories() -> dict[str, list[str]]:
    """Tasks by the group that averages them: lm-eval tags a subject with the group's name and "_tasks"."""
    categories: dict[str, list[str]] = {}
    for task in mmlu_tasks():
        if not task.is_group:
            categories.setdefault(str(task.settings["tag"]).removesuffix("_tasks"), []).append(task.name)
    return categories


def _subject(task: StockTask) -> str:
    return str(task.config)
