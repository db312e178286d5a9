from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.report import EvalReport, Metric
from evaluation.stock_tasks import PAPER_TASKS, mmlu_tasks, stock_task
from evaluation.suites import mmlu, zero_shot
from tests.evaluation.local_data import LocalData, arc_rows, hellaswag_rows, mmlu_rows, piqa_rows, write_data


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    write_data(tmp_path, "baber/piqa", "plain_text", {"train": piqa_rows(6), "validation": piqa_rows(9)})
    write_data(
        tmp_path,
        "allenai/ai2_arc",
        "ARC-Easy",
        {"train": arc_rows(5), "validation": arc_rows(3), "test": arc_rows(11)},
    )
    write_data(tmp_path, "Rowan/hellaswag", "default", {"validation": hellaswag_rows(7)})
    return LocalData(tmp_path)


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, tasks: tuple[str, ...], **given: Any
) -> dict[str, Any]:
    """The stock tasks through lm_eval.simple_evaluate, the data redirected in another way: in load_dataset itself."""
    folders = sorted({stock_task(name).path.parent for name in tasks})
    original = lm_eval.api.task.datasets.load_dataset

    def redirected(path: str, name: str | None = None, **kwargs: Any) -> Any:
        return original(str(data.root / path), name, cache_dir=str(data.root / "cache"), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.api.task.datasets, "load_dataset", redirected)
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=[str(f) for f in folders], include_defaults=False),
            bootstrap_iters=1000,
            **given,
        )
    assert results is not None
    return dict(results["results"])


def assert_equal_scores(report: EvalReport, expected: dict[str, Any]) -> None:
    assert {metric.task for metric in report.metrics} == set(expected)
    for metric in report.metrics:
        assert metric.value == pytest.approx(expected[metric.task][f"{metric.metric},none"], abs=1e-12)
        assert metric.stderr == pytest.approx(expected[metric.task][f"{metric.metric}_stderr,none"], abs=1e-12)


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_the_scores_are_those_of_simple_evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, num_fewshot: int
) -> None:
    tasks = ("piqa", "arc_easy")
    config = zero_shot.Config(tasks=tasks, num_fewshot=num_fewshot)
    report = zero_shot.evaluate(model, tokenizer, data, config, batch_size=3)
    assert_equal_scores(report, by_hand(model, tokenizer, data, tasks, num_fewshot=num_fewshot))
    assert all(metric.num_fewshot == num_fewshot for metric in report.metrics)


def test_the_seed_draws_the_fewshot_examples_and_the_limit_cuts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",), num_fewshot=2, limit=4, seed=7)
    report = zero_shot.evaluate(model, tokenizer, data, config)
    given = {"num_fewshot": 2, "limit": 4, "fewshot_random_seed": 7}
    assert_equal_scores(report, by_hand(model, tokenizer, data, ("piqa",), **given))
    assert [metric.num_examples for metric in report.metrics] == [4, 4]


def test_every_row_says_what_it_is(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa", "arc_easy")))

    assert [(m.task, m.metric, m.num_examples) for m in report.metrics] == [
        ("piqa", "acc", 9),
        ("piqa", "acc_norm", 9),
        ("arc_easy", "acc", 11),
        ("arc_easy", "acc_norm", 11),
    ]
    for metric in report.metrics:
        assert metric.higher_is_better
        assert metric.task_version == "1.0"
        assert metric.stderr is not None
        assert 0 <= metric.stderr < 0.5
    protocol = report.protocol
    assert protocol["chat_template"] is None
    assert protocol["limit"] is None
    assert protocol["num_fewshot"] == 0
    assert protocol["lm_eval"] == lm_eval.__version__
    assert protocol["tokenizer_adds_bos"] is True
    assert protocol["max_length"] == 512
    assert protocol["data"] == ["allenai/ai2_arc: test", "baber/piqa: validation"]
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_one_document_has_no_standard_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",), limit=1))
    assert [metric.stderr for metric in report.metrics] == [None, None]


def test_prompts_cut_to_the_models_length_are_counted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",), limit=2)
    assert zero_shot.evaluate(model, tokenizer, data, config).protocol["truncated_requests"] == 0
    model.config.max_position_embeddings = 30
    assert zero_shot.evaluate(model, tokenizer, data, config).protocol["truncated_requests"] == 4


def test_hellaswag_without_a_training_split_runs_zero_shot_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("hellaswag",)))
    assert report.metrics[0].num_examples == 7
    # Drawing the examples from the scored split instead would be another benchmark under the same name.
    with pytest.raises(EvaluationError, match="task 'hellaswag' reads the split 'train'"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("hellaswag",), num_fewshot=1))


def test_missing_data_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    folder = data.root / "allenai/openbookqa"
    with pytest.raises(EvaluationError, match=rf"task 'openbookqa' reads allenai/openbookqa \(main\).*{folder}"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa", "openbookqa")))


def test_broken_data_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    (data.root / "baber/piqa/plain_text/validation-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(EvaluationError, match="data of task 'piqa' could not be loaded"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",)))


def test_edited_data_is_not_served_stale(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",))
    before = zero_shot.evaluate(model, tokenizer, data, config)
    readme = data.root / "baber/piqa/README.md"
    text = readme.read_text()
    write_data(data.root, "baber/piqa", "plain_text", {"train": piqa_rows(6), "validation": piqa_rows(4)})
    readme.write_text(text)
    after = zero_shot.evaluate(model, tokenizer, data, config)
    assert (before.metrics[0].num_examples, after.metrics[0].num_examples) == (9, 4)


def test_an_unknown_task_is_refused_by_evaluate_too(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    with pytest.raises(EvaluationError, match="did you mean 'piqa'"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqua",)))


def global_states() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_nothing_outside_is_changed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: LocalData,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model.train()
    logger = logging.getLogger("lm_eval")
    before = global_states(), logger.level
    tqdm, bars_off = lm_eval.api.task.tqdm, lm_eval.api.task.datasets.are_progress_bars_disabled()
    capfd.readouterr()

    zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",)))
    with pytest.raises(EvaluationError):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("openbookqa",)))

    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert (global_states(), logger.level) == before
    assert lm_eval.api.task.tqdm is tqdm
    assert lm_eval.api.task.datasets.are_progress_bars_disabled() == bars_off
    assert model.training
    assert tokenizer.pad_token is None


def test_two_threads_give_the_figures_of_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",), num_fewshot=1)
    alone = zero_shot.evaluate(model, tokenizer, data, config)
    found: list[EvalReport] = []
    run: Callable[[], None] = lambda: found.append(zero_shot.evaluate(model, tokenizer, data, config))  # noqa: E731
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]


def test_progress_rises_to_one(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    heard: list[tuple[float, str]] = []
    zero_shot.evaluate(
        model,
        tokenizer,
        data,
        zero_shot.Config(tasks=("piqa", "arc_easy")),
        batch_size=4,
        progress=lambda share, message: heard.append((share, message)),
    )
    shares = [share for share, _ in heard]
    assert heard[0] == (0.0, "loading piqa")
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 5


def test_mmlu_has_lm_evals_averages(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Five subjects of unequal size: all 57 would load for ten seconds.
    sizes = {"anatomy": 3, "astronomy": 5, "sociology": 4, "philosophy": 6, "nutrition": 2}
    for subject, size in sizes.items():
        write_data(tmp_path, "cais/mmlu", subject, {"test": mmlu_rows(size), "dev": mmlu_rows(5)})
    kept = tuple(task for task in mmlu_tasks() if task.is_group or task.config in sizes)
    monkeypatch.setattr(mmlu, "mmlu_tasks", lambda: kept)

    report = mmlu.evaluate(model, tokenizer, LocalData(tmp_path), mmlu.Config(), batch_size=4)

    rows = {metric.task: metric for metric in report.metrics}
    assert all(metric.num_fewshot == 5 and metric.metric == "acc" for metric in report.metrics)
    assert rows["mmlu_anatomy"].num_examples == 3
    assert rows["mmlu_anatomy"].task_version == "1.0"
    assert rows["mmlu"].num_examples == 20
    assert rows["mmlu"].task_version == "2"
    assert rows["mmlu_stem"].num_examples == 8
    stem = 3 * rows["mmlu_anatomy"].value + 5 * rows["mmlu_astronomy"].value
    assert rows["mmlu_stem"].value == pytest.approx(stem / 8)
    leaves = sum(size * rows[f"mmlu_{subject}"].value for subject, size in sizes.items())
    assert rows["mmlu"].value == pytest.approx(leaves / 20)
    assert rows["mmlu"].stderr is not None


def test_the_papers_average_takes_each_tasks_own_metric() -> None:
    metrics = [
        Metric(task=task, metric=name, value=value, stderr=0.07, num_fewshot=0, num_examples=10, higher_is_better=True)
        for task in PAPER_TASKS
        for name, value in (("acc", 0.4), ("acc_norm", 0.75))
    ]
    average = zero_shot.paper_average(metrics)
    assert average.value == pytest.approx((4 * 0.4 + 3 * 0.75) / 7)
    assert average.stderr == pytest.approx(0.07 / 7**0.5)
    assert average.num_examples == 70
    assert average.num_fewshot == 0
    assert set(zero_shot.AVERAGE_RECIPE) == set(PAPER_TASKS)


def test_a_mirror_brings_data_and_neither_tasks_nor_code(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    """lm-eval runs what a task file names by `!function`; a task file in a data folder must not be found."""
    config = zero_shot.Config(tasks=("piqa",))
    expected = zero_shot.evaluate(model, tokenizer, data, config)
    folder = data.root / "baber/piqa"
    mark = data.root / "code was run"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef run(doc): return 0\n")
    task = "task: piqa\ndataset_path: baber/piqa\nvalidation_split: validation\ndoc_to_target: !function evil.run\n"
    (folder / "piqa.yaml").write_text(task)
    assert zero_shot.evaluate(model, tokenizer, data, config) == expected
    (folder / "piqa.py").write_text((folder / "evil.py").read_text())
    with pytest.raises(EvaluationError, match=r"scripts are no longer supported, but found piqa\.py"):
        zero_shot.evaluate(model, tokenizer, data, config)
    assert not mark.exists()
