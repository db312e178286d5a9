from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.api.task
import lm_eval.evaluator
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.harness.stock_tasks import stock_task, tasks_folder
from evaluation.inference.options import EvalOptions
from evaluation.inference.prompts import chat_prompt, cut_middle
from evaluation.report import EvalReport
from evaluation.samples import Sample
from evaluation.significance.paired import pair
from evaluation.suite import ModelFacts
from evaluation.suites import longbench
from evaluation.suites.longbench import CONTINUED, KNOWN, TASKS
from tests.evaluation.local_data import LocalData, Rows, write_data
from tests.tiny import tiny_model

CHAT = "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [answer]"
REPO = "Xnhyacinth/LongBench"
NAMES = ("hotpotqa", "trec", "lcc")
TASK_NAMES = tuple(f"longbench_{name}" for name in NAMES)


def rows(name: str, count: int) -> Rows:
    return [
        {
            "question": f"Which animal has {i} legs?",
            "context": " ".join(f"{name} {n}: a fox has {n + i} legs." for n in range(10 + 12 * i)),
            "answers": ["Paragraph 1", "Paragraph 2"] if "retrieval" in name else ["a fox", "the dog"],
            "length": 10,
            "dataset": name,
            "language": "en",
            "all_classes": ["a fox", "the dog", "a spider"],
            "_id": str(i),
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> LocalData:
    for count, name in enumerate(NAMES, start=2):
        write_data(tmp_path, REPO, name, {"test": rows(name, count)})
    return LocalData(tmp_path)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=1, max_position_embeddings=1024)


def by_hand(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData, tasks: tuple[str, ...], **given: Any
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Scores and answers of lm_eval.simple_evaluate, its data redirected in load_dataset itself."""
    original = lm_eval.api.task.datasets.load_dataset

    def redirected(path: str, name: str | None = None, **kwargs: Any) -> Any:
        return original(str(data.root / path), name, cache_dir=str(data.root / "cache"), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.api.task.datasets, "load_dataset", redirected)
        patch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # runs pip for seconds
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=given.pop("max_length", None)),
            tasks=list(tasks),
            task_manager=TaskManager(include_path=str(tasks_folder() / "longbench"), include_defaults=False),
            **given,
        )
    assert found is not None
    answers = {task: [entry["filtered_resps"][0] for entry in found["samples"][task]] for task in tasks}
    return dict(found["results"]), answers


def answers_of(samples: tuple[Sample, ...]) -> dict[str, list[str | None]]:
    found: dict[str, list[str | None]] = {}
    for sample in samples:
        found.setdefault(sample.task, []).append(sample.response)
    return found


def assert_equal_scores(report: EvalReport, expected: dict[str, Any]) -> None:
    assert [metric.task for metric in report.metrics] == list(expected)
    for metric in report.metrics:
        assert metric.value == pytest.approx(expected[metric.task]["score,none"], abs=1e-12)
        assert metric.stderr == pytest.approx(expected[metric.task]["score_stderr,none"], abs=1e-12)


def test_cut_at_the_left_the_scores_are_lm_evals(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    config = longbench.Config(tasks=TASK_NAMES, truncation="left", max_length=300, limit=2)
    result = longbench.evaluate(model, tokenizer, data, config, EvalOptions(batch_size=4))
    expected, answers = by_hand(model, tokenizer, data, TASK_NAMES, max_length=300, limit=2)
    assert_equal_scores(result.report, {task: expected[task] for task in TASK_NAMES})
    assert answers_of(result.samples) == answers
    assert result.report.protocol["truncated_requests"] == 5


def test_the_chat_template_is_lm_evals_and_not_for_examples_and_code(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    tokenizer.chat_template = CHAT
    _, templated = by_hand(model, tokenizer, data, TASK_NAMES[:1], apply_chat_template=True, limit=1)
    _, bare = by_hand(model, tokenizer, data, TASK_NAMES[1:], limit=1)
    for truncation in ("left", "middle"):  # nothing is cut, so both ask the same
        config = longbench.Config(tasks=TASK_NAMES, truncation=truncation, chat_template=True, limit=1)
        result = longbench.evaluate(model, tokenizer, data, config)
        assert answers_of(result.samples) == templated | bare
        assert [sample.task for sample in result.samples] == list(TASK_NAMES)
        assert result.samples[0].prompt is not None
        assert result.samples[0].prompt.endswith("[answer]")
        assert result.report.protocol["without_chat_template"] == ["longbench_trec", "longbench_lcc"]
        assert result.report.protocol["chat_template"] is not None
        assert result.report.protocol["truncated_requests"] == 0


def test_a_long_prompt_loses_its_middle_before_it_is_put_into_the_template(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData
) -> None:
    tokenizer.chat_template = CHAT
    config = longbench.Config(tasks=("longbench_hotpotqa",), max_length=200, chat_template=True)
    result = longbench.evaluate(model, tokenizer, data, config)
    # lm-eval's own prompt, from its template
    text = stock_task("longbench_hotpotqa").settings["doc_to_text"]
    row = rows("hotpotqa", 2)[1]
    prompt = text.replace("{{context}}", row["context"]).replace("{{question}}", row["question"])
    cut = cut_middle(tokenizer, tokenizer(prompt)["input_ids"], 200)
    assert result.samples[1].prompt == chat_prompt(tokenizer, cut)
    assert len(cut) < len(prompt)
    assert cut[:40] == prompt[:40]
    protocol = result.report.protocol
    assert protocol["truncation"] == "middle"
    assert protocol["max_length"] == {"tokens": 200, "of": "prompt"}
    assert protocol["context"] == 1024
    assert protocol["truncated_requests"] == 2
    # What was asked otherwise is not to be paired.
    other = longbench.evaluate(model, tokenizer, data, config.model_copy(update={"max_length": 180}))
    assert other.samples[1].item_hash != result.samples[1].item_hash


def test_a_row_per_task_category_and_the_average(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sizes = {"passage_count": 2, "passage_retrieval_en": 3, "lcc": 2, "repobench-p": 3}
    for name, size in sizes.items():
        write_data(tmp_path, REPO, name, {"test": rows(name, size)})
    config = longbench.Config(categories=("synthetic", "code"))
    result = longbench.evaluate(model, tokenizer, LocalData(tmp_path), config)
    found = {metric.task: metric for metric in result.report.metrics}
    tasks = [f"longbench_{name}" for name in sizes]
    assert list(found) == [*tasks, "synthetic", "code", "average"]
    assert all(metric.metric == "score" and 0 <= metric.value <= 1 for metric in found.values())
    assert [found[task].num_examples for task in tasks] == list(sizes.values())
    assert found["longbench_lcc"].task_version == "6.0"
    code = [found[task] for task in tasks[2:]]
    assert 0 < found["code"].value == pytest.approx(sum(metric.value for metric in code) / 2)
    assert found["code"].stderr == pytest.approx(sum((metric.stderr or 0) ** 2 for metric in code) ** 0.5 / 2)
    # Not the mean over the tasks, nor over the documents.
    assert found["average"].value == pytest.approx((found["synthetic"].value + found["code"].value) / 2)
    assert found["average"].num_examples == 10
    assert [average.parts for average in result.report.averages] == [
        tuple((task, "score") for task in tasks[:2]),
        tuple((task, "score") for task in tasks[2:]),
        (("synthetic", "score"), ("code", "score")),
    ]
    paired, _ = pair(result.samples, result.samples, averages=result.report.averages, resamples=100)
    assert {each.task: each.value for each in paired} == pytest.approx(
        {task: metric.value for task, metric in found.items()}
    )
    for task in tasks:
        scores = [sample.scores["score"] for sample in result.samples if sample.task == task]
        assert sum(scores) / len(scores) == pytest.approx(found[task].value)
        assert all(set(sample.scores) == {"score"} for sample in result.samples)
    protocol = result.report.protocol
    assert protocol["categories"] == {"synthetic": tasks[:2], "code": tasks[2:]}
    assert protocol["languages"] == ["en"]
    assert protocol["score"]["longbench_lcc"] == "code_sim_score"  # type: ignore[index, call-overload]
    assert protocol["code_similarity"] == "difflib"
    assert protocol["chat_template"] is None
    assert protocol["data"] == [f"{REPO}: test"]
    assert EvalReport.model_validate_json(result.report.model_dump_json()) == result.report


def test_the_table_is_lm_evals_and_its_authors() -> None:
    names = {f"longbench_{name}" for part in TASKS.values() for each in part.values() for name in each}
    assert set(KNOWN) == names
    assert len(KNOWN) == 21
    groups = {"single_doc_qa": "single", "multi_doc_qa": "multi", "few_shot": "fewshot"}
    for category, languages in TASKS.items():
        group = stock_text(f"_longbench_{groups.get(category, category)}.yaml")
        assert all(f"- longbench_{name}\n" in group for each in languages.values() for name in each)
        assert group.count("- longbench_") == len({name for each in languages.values() for name in each})
    english = longbench.Config()
    assert len(longbench.needs(english)) == 16
    assert len(longbench.needs(longbench.Config(languages=("zh",)))) == 7
    assert len(longbench.needs(longbench.Config(languages=("en", "zh")))) == 21
    assert {need.split for need in longbench.needs(english)} == {"test"}
    # "chat models are better off without build prompts on these tasks"
    assert {name.removeprefix("longbench_") for name in CONTINUED} == {
        *("trec", "triviaqa", "samsum", "lsht"),
        *("lcc", "repobench-p"),
    }


def stock_text(name: str) -> str:
    return (tasks_folder() / "longbench" / name).read_text()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"tasks": ["qasper"]}, r"no task 'qasper'; did you mean 'longbench_qasper'\?"),
        ({"tasks": ["longbench_hotpot"]}, r"did you mean 'longbench_hotpotqa'"),
        ({"tasks": ["longbench_lcc"] * 2}, "tasks names longbench_lcc more than once"),
        ({"categories": ["code", "code"]}, "categories names code more than once"),
        ({"tasks": ["longbench_lcc"], "languages": ["en"]}, "tasks beside categories or languages"),
    ],
)
def test_bad_tasks_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        longbench.check(longbench.Config(**given))


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    longbench.check(longbench.Config())
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == "rouge" else find(name, *args))
    with pytest.raises(EvaluationError, match="need rouge, not installed here; pip install jieba fuzzywuzzy rouge"):
        longbench.check(longbench.Config())


@pytest.mark.parametrize(
    "given, facts, words",
    [
        ({"chat_template": True}, ModelFacts(4096, False), "the model's tokenizer has no chat template"),
        ({"max_length": 4000}, ModelFacts(4096), "set max_length to 3584 or less"),
        ({"max_length": 5000, "truncation": "left"}, ModelFacts(4096), "max_length 5000 is longer than the model's"),
        ({"max_length": 512, "truncation": "left"}, ModelFacts(), "writes 512 tokens, which leaves no room"),
        ({}, ModelFacts(512), "'longbench_gov_report' writes 512 tokens, which leaves no room for a prompt in 512"),
    ],
)
def test_what_a_model_cannot_do_is_refused(given: dict[str, Any], facts: ModelFacts, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        longbench.check_model(longbench.Config(**given), facts)


def test_what_is_not_known_is_not_refused() -> None:
    longbench.check_model(longbench.Config(chat_template=True, max_length=31500), ModelFacts())
    longbench.check_model(longbench.Config(max_length=31500), ModelFacts(32768, None))


def test_evaluate_finds_out_itself(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: LocalData) -> None:
    with pytest.raises(EvaluationError, match="no chat template"):
        longbench.evaluate(model, tokenizer, data, longbench.Config(tasks=TASK_NAMES, chat_template=True))
    with pytest.raises(EvaluationError, match="max_length 1000"):
        longbench.evaluate(model, tokenizer, data, longbench.Config(tasks=TASK_NAMES, max_length=1000))
    with pytest.raises(EvaluationError, match=r"task 'longbench_qasper' reads Xnhyacinth/LongBench \(qasper\)"):
        longbench.evaluate(model, tokenizer, data, longbench.Config(tasks=("longbench_qasper",)))


def test_chinese_is_scored_in_silence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path, REPO, "multifieldqa_zh", {"test": rows("multifieldqa_zh", 1)})
    importlib.import_module("jieba")
    logger = logging.getLogger("jieba")
    level = logger.level
    reported: list[float] = []
    options = EvalOptions(progress=lambda share, _: reported.append(share))
    config = longbench.Config(categories=("single_doc_qa",), languages=("zh",))
    capfd.readouterr()
    result = longbench.evaluate(model, tokenizer, LocalData(tmp_path), config, options)
    assert capfd.readouterr() == ("", "")
    assert [metric.task for metric in result.report.metrics] == [
        "longbench_multifieldqa_zh",
        "single_doc_qa",
        "average",
    ]
    assert reported == sorted(reported)
    assert reported[-1] == 1.0
    assert logger.level == level
