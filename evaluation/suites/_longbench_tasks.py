"""The tasks of LongBench (arXiv 2308.14508) by category and language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


def task_name(name: str) -> str:
    """lm-eval's name of a task of LongBench."""
    return f"longbench_{name}"


KNOWN = tuple(dict.fromkeys(task_name(name) for part in TASKS.values() for names in part.values() for name in names))
"""lm-eval's names of all 21."""

_CONTINUED: tuple[Category, ...] = ("few_shot", "code")
CONTINUED = frozenset(
    task_name(name) for category in _CONTINUED for names in TASKS[category].values() for name in names
)
"""Never put into a chat template: their prompts end in the middle of what is to be continued (the authors' pred.py)."""


def tasks_by_category(categories: Sequence[Category], languages: Sequence[Language]) -> dict[str, tuple[str, ...]]:
    """lm-eval's names of the tasks of each category, once each."""
    chosen = {category: [name for each in languages for name in TASKS[category][each]] for category in categories}
    return {category: tuple(task_name(name) for name in dict.fromkeys(names)) for category, names in chosen.items()}
