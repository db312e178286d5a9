from __future__ import annotations

import copy
import hashlib
import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import PAPER_TASKS, mmlu_tasks, stock_task
from evaluation.inference.options import EvalOptions
from evaluation.report import EvalReport, Metric
from evaluation.significance.paired import pair
from evaluation.suite import ModelFacts, SuiteResult
from evaluation.suites import mmlu, zero_shot
from tests.evaluation.local_data import (
    LocalData,
    arc_rows,
    hellaswag_rows,
    mmlu_rows,
    piqa_rows,
    winogrande_rows,
    write_data,
)
from tests.tiny import tiny_model


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
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # it asks pip, for seconds
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=3),
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
    report = zero_shot.evaluate(model, tokenizer, data, config, EvalOptions(batch_size=3)).report
    assert_equal_scores(report, by_hand(model, tokenizer, data, tasks, num_fewshot=num_fewshot))
    assert all(metric.num_fewshot == num_fewshot for metric in report.metrics)


def test_the_seed_draws_the_fewshot_examples_and_the_limit_cuts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",), num_fewshot=2, limit=4, seed=7)
    report = zero_shot.evaluate(model, tokenizer, data, config).report
    given = {"num_fewshot": 2, "limit": 4, "fewshot_random_seed": 7}
    assert_equal_scores(report, by_hand(model, tokenizer, data, ("piqa",), **given))
    assert [metric.num_examples for metric in report.metrics] == [4, 4]


def test_every_row_says_what_it_is(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa", "arc_easy"))).report

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
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",), limit=1)).report
    assert [metric.stderr for metric in report.metrics] == [None, None]


def test_prompts_cut_to_the_models_length_are_counted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = zero_shot.Config(tasks=("piqa",), limit=2)
    assert zero_shot.evaluate(model, tokenizer, data, config).report.protocol["truncated_requests"] == 0
    model.config.max_position_embeddings = 30
    assert zero_shot.evaluate(model, tokenizer, data, config).report.protocol["truncated_requests"] == 4


def test_hellaswag_without_a_training_split_runs_zero_shot_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    report = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("hellaswag",))).report
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
    assert (before.report.metrics[0].num_examples, after.report.metrics[0].num_examples) == (9, 4)


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
    found: list[SuiteResult] = []
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
        EvalOptions(batch_size=4, progress=lambda share, message: heard.append((share, message))),
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

    report = mmlu.evaluate(model, tokenizer, LocalData(tmp_path), mmlu.Config(), EvalOptions(batch_size=4)).report

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


SUBJECTS = ("anatomy", "astronomy", "nutrition")


def test_mmlu_of_some_subjects_has_an_average_that_says_so(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dict(zip(SUBJECTS, (3, 5, 9), strict=True))
    for subject, size in sizes.items():
        write_data(tmp_path, "cais/mmlu", subject, {"test": mmlu_rows(size), "dev": mmlu_rows(5)})
    # as if STEM had these two only: a category that is complete keeps its row
    stem = {"anatomy", "astronomy"}
    kept = tuple(t for t in mmlu_tasks() if t.settings.get("tag") != "mmlu_stem_tasks" or t.config in stem)
    monkeypatch.setattr(mmlu, "mmlu_tasks", lambda: kept)
    result = mmlu.evaluate(model, tokenizer, LocalData(tmp_path), mmlu.Config(subjects=SUBJECTS))

    rows = {metric.task: metric for metric in result.report.metrics}
    assert set(rows) == {"mmlu_stem", *(f"mmlu_{subject}" for subject in SUBJECTS), "mmlu_3_subjects"}
    part = rows["mmlu_3_subjects"]
    right = sum(sample.scores["acc"] for sample in result.samples)
    assert (part.value, part.num_examples) == (pytest.approx(right / 17), 17)
    stderrs, counts = zip(*((rows[f"mmlu_{s}"].stderr, size) for s, size in sizes.items()), strict=True)
    assert part.stderr == pytest.approx(lm_eval.api.metrics.pooled_sample_stderr(list(stderrs), list(counts)))
    assert {average.task: len(average.parts) for average in result.report.averages} == {
        "mmlu_stem": 2,
        "mmlu_3_subjects": 3,
    }
    assert result.report.protocol["subjects"] == list(SUBJECTS)


def test_mmlu_of_one_subject_is_that_subject(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_data(tmp_path, "cais/mmlu", "anatomy", {"test": mmlu_rows(3), "dev": mmlu_rows(5)})
    result = mmlu.evaluate(model, tokenizer, LocalData(tmp_path), mmlu.Config(subjects=("anatomy",)))
    assert [metric.task for metric in result.report.metrics] == ["mmlu_anatomy"]
    assert [(sample.task, sample.item) for sample in result.samples] == [("mmlu_anatomy", n) for n in range(3)]


def test_a_subject_that_does_not_exist_is_refused() -> None:
    with pytest.raises(EvaluationError, match="MMLU has no subject 'anatomie'; did you mean 'anatomy'"):
        mmlu.check(mmlu.Config(subjects=("anatomie",)))
    with pytest.raises(EvaluationError, match="MMLU has no subject 'zzz'; there are abstract_algebra, anatomy,"):
        mmlu.check(mmlu.Config(subjects=("zzz",)))
    with pytest.raises(EvaluationError, match="subjects names anatomy more than once"):
        mmlu.check(mmlu.Config(subjects=("anatomy", "anatomy")))


def test_the_samples_are_what_the_figures_are_the_means_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    write_data(data.root, "allenai/winogrande", "winogrande_xl", {"validation": winogrande_rows(5)})
    tasks = ("piqa", "arc_easy", "winogrande")
    result = zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=tasks, num_fewshot=0))
    for metric in result.report.metrics:
        scores = [sample.scores[metric.metric] for sample in result.samples if sample.task == metric.task]
        assert len(scores) == metric.num_examples
        assert np.mean(scores) == pytest.approx(metric.value)
    names = {task: {m.metric for m in result.report.metrics if m.task == task} for task in tasks}
    assert all(set(sample.scores) == names[sample.task] for sample in result.samples)
    assert [sample.item for sample in result.samples if sample.task == "piqa"] == list(range(9))
    assert len({(sample.task, sample.item_hash) for sample in result.samples}) == len(result.samples)

    first = next(sample for sample in result.samples if sample.task == "piqa")
    assert first.prompt == "Question: How do you open box 0?\nAnswer:"
    assert first.target == "lift the lid 0 times"
    assert first.response in ("lift the lid 0 times", "paint it in 0 colours and wait")
    for sample in result.samples:
        assert sample.scores["acc"] == (sample.response == sample.target)
    asked = next(sample for sample in result.samples if sample.task == "winogrande")
    assert asked.target == "The fox saw dog 0 because the fox"


def test_the_hash_tells_what_was_asked_and_not_who_was(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    def hashes(model: PreTrainedModel, **given: Any) -> list[str]:
        config = zero_shot.Config(tasks=("piqa",), limit=4, **given)
        return [sample.item_hash for sample in zero_shot.evaluate(model, tokenizer, data, config).samples]

    assert hashes(model) == hashes(tiny_model("qwen2", seed=1))
    assert not set(hashes(model)) & set(hashes(model, num_fewshot=1))


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


@pytest.mark.parametrize("multiturn", [False, True])
def test_the_chat_template_is_applied_as_lm_eval_does(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, multiturn: bool
) -> None:
    tokenizer.chat_template = TEMPLATE
    tasks = ("piqa", "arc_easy")
    config = zero_shot.Config(tasks=tasks, num_fewshot=1, chat_template=True, fewshot_as_multiturn=multiturn)
    result = zero_shot.evaluate(model, tokenizer, data, config)
    given = {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": multiturn}
    assert_equal_scores(result.report, by_hand(model, tokenizer, data, tasks, **given))
    assert str(result.samples[0].prompt).count("[user]") == 1 + multiturn
    recorded: Any = result.report.protocol["chat_template"]
    assert recorded == {"sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(), "fewshot_as_multiturn": multiturn}


@pytest.mark.parametrize("suite", [zero_shot, mmlu])
def test_a_chat_template_that_is_not_there_is_refused_at_once(
    suite: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = suite.Config(chat_template=True)
    for facts in (ModelFacts(has_chat_template=True), ModelFacts()):
        suite.check_model(config, facts)
    suite.check_model(suite.Config(), ModelFacts(has_chat_template=False))
    with pytest.raises(EvaluationError, match="tokenizer has no chat template; set chat_template: false"):
        suite.check_model(config, ModelFacts(has_chat_template=False))
    with pytest.raises(EvaluationError, match="tokenizer has no chat template"):
        suite.evaluate(model, tokenizer, LocalData(tmp_path), config)


def test_a_broken_model_is_told_and_not_scored(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    """The likeliest of answers that are all NaN is the first: lm-eval would call that an accuracy."""
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="logits are NaN"):
        zero_shot.evaluate(model, tokenizer, data, zero_shot.Config(tasks=("piqa",)))


def test_a_tasks_own_perplexity_is_that_of_simple_evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    """Texts of one to several windows, all through one call of the model's scoring."""
    model.config.max_position_embeddings = 64
    pages = [{"page": " = Dogs = \n\n The quick brown fox jumps over the lazy dog . " * n} for n in (1, 6, 15)]
    write_data(data.root, "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", {"train": pages, "test": pages})
    result = zero_shot.evaluate(
        model, tokenizer, data, zero_shot.Config(tasks=("wikitext",)), EvalOptions(batch_size=4)
    )
    expected = by_hand(model, tokenizer, data, ("wikitext",))["wikitext"]
    for metric in result.report.metrics:
        assert metric.value == pytest.approx(expected[f"{metric.metric},none"], rel=1e-5)
        assert not metric.higher_is_better
    assert [(sample.item, sample.scores) for sample in result.samples] == [(0, {}), (1, {}), (2, {})]


def test_the_samples_of_a_perplexity_of_answers_are_paired_like_those_of_any_other(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    """LAMBADA's is exp(-mean) over log-likelihoods in lm-eval; here all are exp(mean) over negative ones."""
    rows = [{"text": f"The quick brown fox number {n} jumps over the lazy dog"} for n in range(5)]
    write_data(data.root, "EleutherAI/lambada_openai", "default", {"test": rows})
    config = zero_shot.Config(tasks=("lambada_openai",))
    mine, theirs = (zero_shot.evaluate(each, tokenizer, data, config) for each in (model, tiny_model("llama", seed=1)))
    figures = [{metric.metric: metric.value for metric in result.report.metrics} for result in (mine, theirs)]
    assert set(figures[0]) == {"perplexity", "acc"}
    found, problems = pair(mine.samples, theirs.samples)
    assert problems == ()
    assert {each.metric: each.value for each in found} == pytest.approx(figures[0])
    assert {each.metric: each.reference_value for each in found} == pytest.approx(figures[1])
    assert all(sample.scores["perplexity"] > 0 <= sample.scores["acc"] for sample in mine.samples)


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
    (folder / "piqa.py").write_text((folder / "evil.py").read_text())
    assert zero_shot.evaluate(model, tokenizer, data, config) == expected
    assert not mark.exists()
