"""Any of lm-eval's stock tasks; by default the seven of the pruning papers, zero-shot, with their average."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from evaluation.bounds import Amount, Count, Seed
from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import PAPER_TASKS, StockTask, stock_task
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import check_chat_template, max_gen_toks
from evaluation.naming import refuse_twice
from evaluation.report import Average, EvalReport, Metric, plain_mean
from evaluation.suite import DataNeed, ModelFacts, SuiteConfig, SuiteData, SuiteResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 2
IMPORTS = ("evaluation.harness.run_tasks",)

AVERAGE_RECIPE = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""Which metric of each task enters the papers' average: the choice in the evaluation code of Shortened LLaMA (arXiv
2402.02834), whose authors matched it to LLM-Pruner's table (arXiv 2305.11627). SlimGPT's text names no choice, but it
prints LLM-Pruner's figures beside its own."""

_PAPER_AVERAGE = Average(task="average", metric="acc", parts=tuple(AVERAGE_RECIPE.items()), weighted_by="tasks")


class Config(SuiteConfig):
    """Which of lm-eval's tasks, and how their prompts are made."""

    tasks: tuple[str, ...] = Field(default=PAPER_TASKS, min_length=1)
    """lm-eval's names of single tasks."""

    num_fewshot: Amount = 0
    limit: Count | None = None
    """Score only the first so many documents of each task."""

    seed: Seed = 1234
    """Draws the few-shot examples; lm-eval's default."""

    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template, as lm-eval's --apply_chat_template does."""

    fewshot_as_multiturn: bool = True
    """With chat_template: each few-shot example is a question and an answer of the conversation, not one long turn."""


def needs(config: Config) -> tuple[DataNeed, ...]:
    """The splits the tasks read, each once."""
    needed = (need for name in config.tasks for need in stock_task(name).needs(config.num_fewshot))
    return tuple(dict.fromkeys(needed))


def check(config: Config) -> None:
    """Raise EvaluationError for a task that lm-eval does not have (naming near names) or that is named twice."""
    for name in config.tasks:
        stock_task(name)
    refuse_twice("tasks", config.tasks)


def check_model(config: Config, facts: ModelFacts) -> None:
    """Raise EvaluationError if the chat template is asked of a tokenizer that has none, or if an answer that a task has
    written does not fit into the model's context."""
    if config.chat_template:
        check_chat_template(facts.has_chat_template)
    context = facts.max_position_embeddings
    if context is None:
        return
    for name in config.tasks:
        settings = stock_task(name).settings
        length = max_gen_toks(settings.get("generation_kwargs") or {})
        # without a type lm-eval has the answers written; other tasks score given ones
        if settings.get("output_type", "generate_until") == "generate_until" and context - length < 2:
            raise EvaluationError(
                f"'{name}' writes {length} tokens, which leaves no room for a prompt in {context}; "
                "take a model of a longer context, or leave the task out"
            )


def definitions(config: Config) -> tuple[StockTask, ...]:
    """The tasks, as lm-eval defines them."""
    return tuple(stock_task(name) for name in config.tasks)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    options: EvalOptions = EvalOptions(),
) -> SuiteResult:
    """Score the tasks; with all seven of the papers a row "average" follows, which has no samples of its own. See
    `harness.run_tasks` for the errors."""
    check(config)
    context = getattr(model.config, "max_position_embeddings", None)
    check_model(config, ModelFacts(context, tokenizer.chat_template is not None))
    from evaluation.harness.run_tasks import TaskRun, run_tasks

    run = TaskRun(
        names=config.tasks,
        definitions=definitions(config),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        seed=config.seed,
        chat_template=config.chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
    )
    metrics, samples, protocol = run_tasks(model, tokenizer, data, run, options)
    averages: tuple[Average, ...] = ()
    if set(PAPER_TASKS) <= set(config.tasks):
        metrics += (paper_average(metrics),)
        protocol["average"] = dict(AVERAGE_RECIPE)
        averages = (_PAPER_AVERAGE,)
    report = EvalReport(suite="zero_shot", metrics=metrics, protocol=protocol, averages=averages)
    return SuiteResult(report, samples)


def paper_average(metrics: Sequence[Metric]) -> Metric:
    """The plain mean over the seven tasks, each with the metric of AVERAGE_RECIPE."""
    chosen = [metric for metric in metrics if AVERAGE_RECIPE.get(metric.task) == metric.metric]
    assert len(chosen) == len(AVERAGE_RECIPE), [metric.task for metric in chosen]
    return plain_mean(_PAPER_AVERAGE, chosen)
