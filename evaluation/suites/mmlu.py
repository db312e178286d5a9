"""MMLU (arXiv 2009.03300): 57 subjects, five-shot, with lm-eval's averages of the four categories and of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from evaluation.report import EvalReport
from evaluation.stock_tasks import mmlu_tasks
from evaluation.suite import DataNeed, Progress, SuiteConfig, SuiteData, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1


class Config(SuiteConfig):
    """How the 57 subjects are asked."""

    num_fewshot: int = Field(default=5, ge=0, le=5)
    """Examples before each question: the first of the subject's dev split, which has five."""

    limit: int | None = Field(default=None, ge=1)
    """Score only the first so many questions of each subject."""


def needs(config: Config) -> tuple[DataNeed, ...]:
    """Each subject's test split, and its dev split if examples are asked for."""
    leaves = [task for task in mmlu_tasks() if not task.is_group]
    return tuple(need for task in leaves for need in task.needs(config.num_fewshot))


def check(config: Config) -> None:
    """Raise EvaluationError if lm-eval, or its MMLU, is not installed."""
    mmlu_tasks()


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: SuiteData,
    config: Config,
    *,
    batch_size: int = 1,
    progress: Progress = silent,
) -> EvalReport:
    """Score all subjects. Tasks "mmlu", "mmlu_humanities", "mmlu_social_sciences", "mmlu_stem" and "mmlu_other" are the
    averages, weighted by questions; the other 57 are the subjects. See `harness.run_tasks` for the errors."""
    from evaluation.harness import TaskRun, run_tasks

    run = TaskRun(
        names=("mmlu",),
        definitions=mmlu_tasks(),
        num_fewshot=config.num_fewshot,
        limit=config.limit,
    )
    metrics, protocol = run_tasks(model, tokenizer, data, run, batch_size=batch_size, progress=progress)
    return EvalReport(suite="mmlu", metrics=metrics, protocol=protocol)
