"""The tables that `slimline report` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from evaluation.suites.zero_shot import AVERAGE_RECIPE
from flows.records.report.entries import Entry
from flows.records.tables import heading
from infra.results.rows import MetricRow

_SLIMGPT, _SHORTENED = "SlimGPT, arXiv 2412.18110", "Shortened LLaMA, arXiv 2402.02834"

Figure = Callable[[MetricRow], str | None]


@dataclass(frozen=True)
class PaperTable:
    """One table. condition: the SQL that chooses its metrics, of which `figure` names the column (None: not shown).

    varied: options that are the point of the table: checkpoints that differ in nothing else make one section, and one
    without such others is left out. fill: what fills the table.
    """

    title: str
    paper: str
    condition: str
    figure: Figure
    fill: str
    keeps: Callable[[Entry], bool] = lambda entry: True
    varied: tuple[str, ...] = ()


def _perplexity(row: MetricRow) -> str | None:
    return f"{row.task} {row.metric}" if row.metric.startswith("ppl@") else None


def _zero_shot(row: MetricRow) -> str | None:
    if row.num_fewshot or row.suite == "mmlu":
        return None
    if row.task == "average":
        return "average"
    return f"{row.task} {row.metric}" if AVERAGE_RECIPE.get(row.task) == row.metric else None


def quality(row: MetricRow) -> str | None:
    """The perplexities and the papers' zero-shot average."""
    return _perplexity(row) or ("zero-shot average" if _zero_shot(row) == "average" else None)


def _speed(row: MetricRow) -> str | None:
    return None if row.metric == "out_of_memory" else heading(row)


def _mmlu(row: MetricRow) -> str | None:
    return _MMLU.get(row.task)


def _longbench(row: MetricRow) -> str | None:
    return _LONGBENCH.get(row.task)


def _depth(entry: Entry) -> bool:
    return entry.row.method in (None, "shortened")


def _untrained(entry: Entry) -> bool:
    return entry.row.recovery is None


def _slimgpt_alone(entry: Entry) -> bool:
    return entry.row.method == "slimgpt" and _untrained(entry)


_PPL = "metric LIKE 'ppl@%'"
_ACC = "metric IN ('acc', 'acc_norm')"
_PROFILE = "suite = 'profile'"
_MMLU = {
    "mmlu_humanities": "Humanities",
    "mmlu_social_sciences": "Social Sciences",
    "mmlu_stem": "STEM",
    "mmlu_other": "Other",
    "mmlu": "MMLU average",
}
_LONGBENCH = {
    "single_doc_qa": "Single-Doc QA",
    "multi_doc_qa": "Multi-Doc QA",
    "summarization": "Summarization",
    "few_shot": "Few-shot",
    "average": "LongBench average",
}

TABLES: Mapping[str, PaperTable] = {
    "slimgpt-1": PaperTable(
        "Perplexity by method and sparsity", f"{_SLIMGPT}, table 1", _PPL, _perplexity,
        "slimline run llama-7b-slimgpt (vicuna-7b-slimgpt, llama2-7b-slimgpt) or nightly papers-comparison, on two "
        "cores slimline run smollm2-135m-p1",
    ),
    "slimgpt-3": PaperTable(
        "Zero-shot accuracy by method and sparsity", f"{_SLIMGPT}, table 3", _ACC, _zero_shot,
        "slimline run llama-7b-slimgpt, slimline nightly papers-comparison, or on two cores slimline run demo",
    ),
    "slimgpt-4": PaperTable(
        "Latency and memory", f"{_SLIMGPT}, table 4", _PROFILE, _speed,
        "slimline run llama-7b-slimgpt, or on two cores slimline run demo",
    ),
    "slimgpt-5": PaperTable(
        "SlimGPT without its parts: -GCD (grouped_cholesky=false), -DGS (a fixed group_size)", f"{_SLIMGPT}, table 5",
        f"{_PPL} OR {_ACC}", quality,
        "slimline run llama-7b-slimgpt-table5, or on two cores slimline run smollm2-135m-ablation",
        _slimgpt_alone, ("grouped_cholesky", "group_size"),
    ),
    "slimgpt-6": PaperTable(
        "Curves of the pruning ratio over depth", f"{_SLIMGPT}, table 6", f"{_PPL} OR {_ACC}", quality,
        "slimline run llama-7b-slimgpt-table6, or on two cores slimline run smollm2-135m-ablation",
        _slimgpt_alone, ("curve", "start_over_end", "end_points"),
    ),
    "slimgpt-14": PaperTable(
        "Calibration sets", f"{_SLIMGPT}, table 14", f"{_PPL} OR {_ACC}", quality,
        "slimline run llama-7b-slimgpt-table14, or any spec whose step has variants with another calibration "
        "(slimline help ablations)",
        _slimgpt_alone, ("calibration.data", "calibration.join"),
    ),
    "slimgpt-mmlu": PaperTable(
        "MMLU by category", f"{_SLIMGPT}, Vicuna-7B and LLaMA2-7B", "metric = 'acc' AND task LIKE 'mmlu%'", _mmlu,
        "slimline run vicuna-7b-slimgpt, slimline run llama2-7b-slimgpt, or any spec with the suite mmlu",
    ),
    "slimgpt-longbench": PaperTable(
        "LongBench by category", f"{_SLIMGPT}, Mistral-7B-Instruct-v0.2", "metric = 'score'", _longbench,
        "slimline run mistral-7b-instruct-slimgpt-20, or any spec with the suite longbench",
    ),
    "shortened-criteria": PaperTable(
        "Which layers go: criteria and ratios, not retrained", _SHORTENED, f"{_PPL} OR {_ACC}", quality,
        "slimline nightly shortened-llama, or on two cores slimline nightly smollm2-135m-comparison",
        lambda entry: _depth(entry) and _untrained(entry),
    ),
    "shortened-retraining": PaperTable(
        "Depth pruning, retrained and not", _SHORTENED, f"{_PPL} OR {_ACC}", quality,
        "slimline nightly shortened-llama, or on two cores slimline nightly smollm2-135m-recovery",
        _depth,
    ),
    "shortened-speed": PaperTable(
        "Latency and throughput", _SHORTENED, _PROFILE, _speed,
        "slimline run llama-7b-efficiency, slimline nightly shortened-llama, or any spec with a profile",
    ),
}  # fmt: skip
