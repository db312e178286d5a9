"""What is recorded about checkpoints beside their dense model."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.report import Average, Metric
from evaluation.samples import Sample
from infra.errors import ArtifactMissing
from infra.results.rows import PairRow
from tasks.stages.pairs import Reports, as_json, beside_dense, by_evaluation
from tests.flows.recorded_runs import Evaluation, Records


def answers(share: float, metric: str = "acc", count: int = 200) -> list[Sample]:
    draw = np.random.default_rng(1).random(count)
    return [Sample("piqa", item, f"i{item}", {metric: float(one < share)}) for item, one in enumerate(draw)]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "home")


def test_every_checkpoint_has_a_row_for_each_figure(records: Records) -> None:
    key = records.add(
        "demo",
        {
            "dense": [Evaluation(answers(0.8)), Evaluation(answers(0.5, "acc_norm"), suite="other")],
            "slimgpt-20": [Evaluation(answers(0.7)), Evaluation(answers(0.4, "acc_norm"), suite="other")],
            "slimgpt-50": [Evaluation(answers(0.3))],
        },
    )
    pairs = beside_dense(records.results.metrics(key), records.store)
    assert [(row.checkpoint, row.reference, row.suite, row.metric) for row in pairs] == [
        ("slimgpt-20", "dense", "zero_shot", "acc"),
        ("slimgpt-20", "dense", "other", "acc_norm"),
        ("slimgpt-50", "dense", "zero_shot", "acc"),
    ]
    first = pairs[0]
    assert (first.run_key, first.test, first.num_items, first.flips_gained) == (key, "mcnemar", 200, 0)
    assert first.difference == pytest.approx(-(first.flips_lost or 0) / 200)
    assert first.stage_key == records.report(key, "slimgpt-20", "zero_shot").key
    (run,) = records.results.runs()
    records.results.record(run, pairs=pairs)
    assert records.results.pairs(key) == pairs
    assert [PairRow(run_key=key, **row) for row in json.loads(as_json(pairs))] == list(pairs)


def test_it_is_the_same_every_time(records: Records) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.8))], "small": [Evaluation(answers(0.7))]})
    metrics = records.results.metrics(key)
    assert beside_dense(metrics, records.store) == beside_dense(metrics, records.store)


def test_without_samples_there_is_a_line_in_the_log_and_no_row(
    records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.8))], "small": [Evaluation(answers(0.7))]})
    (records.store.path(records.report(key, "small", "zero_shot")) / "samples.parquet").unlink()
    with caplog.at_level(logging.WARNING, logger="slimline"):
        assert beside_dense(records.results.metrics(key), records.store) == ()
    assert "zero_shot of small is not compared with dense" in caplog.text


def test_items_that_differ_are_told(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.8))], "small": [Evaluation(answers(0.7, count=90))]})
    with caplog.at_level(logging.WARNING, logger="slimline"):
        assert beside_dense(records.results.metrics(key), records.store) == ()
    assert "small: not compared with dense: zero_shot/piqa/acc: the items differ: 90 beside 200" in caplog.text


def test_an_average_whose_part_cannot_be_paired_is_told(records: Records, caplog: pytest.LogCaptureFixture) -> None:
    recipe = Average(task="average", metric="acc", parts=(("piqa", "acc"), ("boolq", "acc")), weighted_by="tasks")
    figure = Metric(task="average", metric="acc", value=0.7, higher_is_better=True)

    def evaluation(count: int) -> Evaluation:
        boolq = [replace(sample, task="boolq") for sample in answers(0.7, count=count)]
        return Evaluation([*answers(0.7), *boolq], averages=(recipe,), more=(figure,))

    key = records.add("demo", {"dense": [evaluation(200)], "small": [evaluation(199)]})
    with caplog.at_level(logging.WARNING, logger="slimline"):
        assert [row.task for row in beside_dense(records.results.metrics(key), records.store)] == ["piqa"]
    told = "small: not compared with dense: zero_shot/average/acc: its part boolq/acc could not be compared"
    assert told in caplog.text


def test_a_run_without_a_measured_dense_model_has_no_pairs(records: Records) -> None:
    key = records.add("demo", {"small": [Evaluation(answers(0.7))]})
    assert beside_dense(records.results.metrics(key), records.store) == ()


def test_samples_that_cannot_be_read(records: Records) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.8))]})
    path = records.store.path(records.report(key, "dense", "zero_shot")) / "samples.parquet"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactMissing, match="cannot be read"):
        Reports(records.store).read(records.report(key, "dense", "zero_shot").key)


def test_profiles_are_no_evaluations(records: Records) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.8))]})
    (row,) = records.results.metrics(key)
    assert by_evaluation([row, row.model_copy(update={"suite": "profile"})]) == {("dense", "zero_shot"): [row]}
