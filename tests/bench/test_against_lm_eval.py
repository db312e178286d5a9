"""The parts that compare evaluation: what is compared, and the clock; the command itself is run by the part."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evaluation.report import Metric
from evaluation.suites import longbench, mmlu, zero_shot
from tests.bench.against_lm_eval import comparisons, largest, write_task_files
from tests.bench.materials import Materials
from tests.bench.options import Options
from tests.bench.zero_shot import Clock
from tests.evaluation.local_data import hellaswag_rows, piqa_rows, write_data
from tests.tiny import tiny_model

NAMES = ("piqa", "hellaswag", "mmlu_anatomy", "longbench_trec")


def test_every_task_is_given_to_its_suite() -> None:
    first, second, third = comparisons(NAMES, 4)
    assert (first.suite, first.config) == (zero_shot, zero_shot.Config(tasks=("piqa", "hellaswag"), limit=4))
    assert (second.suite, second.num_fewshot) == (mmlu, 5)
    assert [task.name for task in second.tasks] == ["mmlu_anatomy"]
    assert (third.suite, third.batch_size) == (longbench, 1)


def test_a_task_file_names_nothing_but_the_data(tmp_path: Path) -> None:
    write_data(tmp_path / "hub", "baber/piqa", "plain_text", {"train": piqa_rows(2), "validation": piqa_rows(2)})
    write_data(tmp_path / "hub", "Rowan/hellaswag", "default", {"validation": hellaswag_rows(2)})
    materials = Materials(Options(mirror=str(tmp_path / "hub"), scratch=tmp_path))
    write_task_files(materials, tmp_path / "tasks", next(comparisons(("piqa", "hellaswag"), 4)))
    piqa, hellaswag = (yaml.safe_load((tmp_path / f"tasks/{name}.yaml").read_text()) for name in ("piqa", "hellaswag"))
    assert set(piqa) == {"include", "dataset_path", "dataset_kwargs"}
    assert Path(piqa["dataset_path"]).resolve() == tmp_path / "hub/baber/piqa"
    assert hellaswag["training_split"] is None


def metric(value: float, stderr: float | None) -> Metric:
    return Metric(task="piqa", metric="acc", value=value, stderr=stderr, higher_is_better=True)


@pytest.mark.parametrize(
    ("stderr", "theirs", "expected"),
    [(0.1, 0.1, 0.0), (0.1, 0.3, 0.2), (None, "N/A", 0.0), (0.1, "N/A", float("inf")), (None, 0.1, float("inf"))],
)
def test_the_largest_difference_is_found(stderr: float | None, theirs: float | str, expected: float) -> None:
    ours = [metric(0.5, stderr)]
    by_hand = {"piqa": {"acc,none": 0.25, "acc_stderr,none": theirs}}
    assert largest(ours, by_hand, "value") == (0.25, "piqa acc")
    assert largest(ours, by_hand, "stderr")[0] == pytest.approx(expected)
    assert largest(ours, {}, "value")[0] == float("inf")


def test_the_clock_gives_the_works_own_results_and_counts_the_tokens() -> None:
    from evaluation.inference.loglikelihood import gather_rows, score_rows

    model = tiny_model("llama")
    rows, _ = gather_rows([([3, 4, 5], [6]), ([3], [7, 8])], 512)
    clock = Clock("cpu", score_rows)
    assert clock(model, rows) == clock(model, rows) == score_rows(model, rows)
    assert (clock.batches, clock.rows, clock.tokens, clock.padded) == (2, 4, 10, 12)
    assert 0 < clock.forward <= clock.lost
    assert clock.scored > 0
