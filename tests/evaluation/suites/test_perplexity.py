"""The suite: its data, its window lengths, what it reports, and lm-eval's own task on the same pages."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import lm_eval
import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import ValidationError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from evaluation.errors import EvaluationError
from evaluation.inference.options import EvalOptions
from evaluation.inference.replicas import ReplicaProcesses
from evaluation.language_modeling.perplexity import perplexity
from evaluation.language_modeling.presets import PRESETS
from evaluation.language_modeling.protocol import WindowProtocol, window_lengths
from evaluation.suite import ModelFacts, SuiteResult
from evaluation.suites import perplexity as suite
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from tests.evaluation.local_data import LocalData, write_data
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

TEXTS = [f"The quick brown fox number {i} jumps over the lazy dog, {i * i} times." for i in range(12)]
PAGES = [
    " \n = The fox = \n \n The quick brown fox ( a dog 's friend ) jumps , 1 @,@ 000 times .",
    " = = Dogs = = \n What is the capital of France ? “ Paris ” – café 🙂 . \n" + " The lazy dog sleeps ." * 12,
    "Pruning",
]


def test_every_window_is_reported_with_its_protocol(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = LocalData(tmp_path, TEXTS)
    shares: list[float] = []
    config = suite.Config(windows=(16, 32), max_windows=4)

    report = suite.evaluate(
        model, tokenizer, data, config, EvalOptions(batch_size=2, progress=lambda share, message: shares.append(share))
    ).report

    assert data.asked == ["Salesforce/wikitext/wikitext-2-raw-v1/test/text"]
    assert [(m.task, m.metric, m.num_examples) for m in report.metrics] == [
        ("wikitext-2-raw-v1", "ppl@16", 4),
        ("wikitext-2-raw-v1", "ppl@32", 4),
    ]
    assert not any(metric.higher_is_better for metric in report.metrics)
    expected = perplexity(model, tokenizer, TEXTS, WindowProtocol(window=32, max_windows=4))
    assert report.metrics[1].value == pytest.approx(expected.ppl)
    assert report.metrics[1].stderr == pytest.approx(expected.stderr)
    assert (report.protocol["bos"], report.protocol["join"]) == ("once", "\n\n")
    assert report.protocol["stride"] == "window (no overlap)"
    assert report.protocol["measured"] == {"16": {"windows": 4, "tokens": 60}, "32": {"windows": 4, "tokens": 124}}
    assert report.protocol["tokenizer_adds_bos"] is True
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_every_window_is_a_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = suite.Config(windows=(16, 32), max_windows=4, keep_last_partial=True, normalise=("word", "byte"))
    data = LocalData(tmp_path, TEXTS)
    result = suite.evaluate(model, tokenizer, data, config)
    again = suite.evaluate(tiny_model("llama", seed=1), tokenizer, data, config)

    assert [m.metric for m in result.report.metrics[:4]] == ["ppl@16", "word_ppl@16", "byte_ppl@16", "bits_per_byte@16"]
    for window, metric in ((16, result.report.metrics[0]), (32, result.report.metrics[4])):
        samples = [sample for sample in result.samples if f"ppl@{window}" in sample.scores]
        assert len(samples) == metric.num_examples == 4
        assert {tuple(sample.scores) for sample in samples} == {(metric.metric,)}
        total = sum(sample.weight * sample.scores[metric.metric] for sample in samples)
        assert metric.value == pytest.approx(math.exp(total / sum(sample.weight for sample in samples)))
    assert len({sample.item_hash for sample in result.samples}) == 8
    assert [(s.task, s.item, s.item_hash) for s in again.samples] == [
        (s.task, s.item, s.item_hash) for s in result.samples
    ]
    assert all(sample.prompt for sample in result.samples)


def test_max_is_the_models_own_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = LocalData(tmp_path, TEXTS * 3)
    config = suite.Config(windows=(128, "max"))
    metrics = suite.evaluate(model, tokenizer, data, config).report.metrics
    assert [metric.metric for metric in metrics] == ["ppl@128", "ppl@512"]
    assert metrics[1].value == pytest.approx(perplexity(model, tokenizer, data.given, WindowProtocol(window=512)).ppl)

    with pytest.raises(EvaluationError, match="states no max_position_embeddings; name a number"):
        window_lengths((128, "max"), None)


def test_a_window_too_long_is_refused_before_data_is_read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = LocalData(tmp_path, TEXTS)
    with pytest.raises(EvaluationError, match="2048"):
        suite.evaluate(model, tokenizer, data, suite.Config())
    assert data.asked == []


def test_what_the_model_cannot_do_is_known_before_it_is_loaded() -> None:
    suite.check_model(suite.Config(windows=(128, "max")), ModelFacts())
    suite.check_model(suite.Config(windows=(128, "max")), ModelFacts(max_position_embeddings=1024))
    for config, message in (
        ({"windows": [128, 2048]}, "window of 2048 tokens is longer than the model's max_position_embeddings of 1024"),
        ({"windows": [1024, "max"]}, r"windows 1024, 1024 names a length twice \(max is 1024\)"),
        ({"windows": ["max"], "stride": 1024}, "stride 1024 is not smaller than the window of 1024 tokens"),
    ):
        with pytest.raises(EvaluationError, match=message):
            suite.check_model(suite.Config.model_validate(config), ModelFacts(max_position_embeddings=1024))


def test_a_protocol_that_contradicts_itself_is_refused() -> None:
    for config, message in (
        ({"windows": [128, 128]}, "windows 128, 128 names a length twice"),
        ({"windows": ["max", "max"]}, "twice"),
        ({"windows": [128, 512, "max"], "stride": 128}, "stride 128 is not smaller than the window of 128 tokens"),
        ({"rolling": True, "bos": "per_window"}, "bos='per_window' and rolling exclude each other"),
        ({"normalise": ["word", "lm_eval_word"]}, "one figure counted twice"),
    ):
        with pytest.raises(EvaluationError, match=message):
            suite.check(suite.Config.model_validate(config))
    for wrong in (
        {"windows": ()},
        {"windows": (1,)},
        {"windows": ("maximum",)},
        {"max_windows": 0},
        {"stride": 0},
        {"bos": "twice"},
        {"documents": "each"},
        {"window": 128},
    ):
        with pytest.raises(ValidationError):
            suite.Config.model_validate(wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_writes_out_data_and_protocol(name: str) -> None:
    config = suite.Config(dataset=name)
    suite.check(config)
    assert "/" in config.dataset
    assert suite.Config.model_validate(config.model_dump(mode="json")) == config
    assert suite.needs(config)[0].repo_id == config.dataset
    other = suite.Config(dataset=name, windows=(77,), join="|")
    assert other == config.model_copy(update={"windows": (77,), "join": "|"})


def test_the_default_is_wikitext_and_any_other_data_needs_no_more_than_its_name() -> None:
    default = suite.Config()
    assert suite.needs(default)[0].model_dump(exclude_none=True) == {
        "repo_id": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "split": "test",
    }
    assert suite.Config(dataset="Salesforce/wikitext") == default
    assert suite.Config(dataset="wikitext2", bos="once") == default
    news = suite.Config(dataset="slimline/news")
    assert (news.config, news.split) == (None, "test")
    notes = suite.Config(dataset="./my.notes.txt")
    assert (notes.config, notes.split) == (None, "train")
    assert suite.Config(dataset="./x.jsonl", split="test", config="en").config == "en"
    assert suite.task_name(suite.Config(dataset="allenai/c4", config="en")) == "c4-en"
    assert suite.task_name(news) == "news"
    assert suite.task_name(notes) == "my.notes"


@pytest.mark.parametrize("length", [32, 512])
def test_the_figures_of_lm_evals_wikitext(
    length: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The stock task, its data set replaced by a local one; this tokenizer adds BOS, which lm-eval then predicts."""
    config = suite.Config(dataset="lm-eval-wikitext", windows=(length,))
    assert config.config is not None
    rows = [{"page": page} for page in PAGES]
    folder = write_data(tmp_path, config.dataset, config.config, dict.fromkeys(("train", "validation", "test"), rows))
    stock, overlay = Path(lm_eval.__file__).parent / "tasks" / "wikitext", tmp_path / "overlay"
    shutil.copytree(stock, overlay)
    task = overlay / "wikitext.yaml"
    task.write_text(task.read_text().replace(config.dataset, str(folder)))

    theirs = simple_evaluate(
        HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=length),
        tasks=["wikitext"],
        task_manager=TaskManager(include_path=str(overlay), include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs is not None
    expected = theirs["results"]["wikitext"]
    result = suite.evaluate(model, tokenizer, LocalData(tmp_path, PAGES), config)

    ours = {metric.metric: metric.value for metric in result.report.metrics}
    assert ours[f"word_ppl@{length}"] == pytest.approx(expected["word_perplexity,none"], rel=1e-5)
    assert ours[f"byte_ppl@{length}"] == pytest.approx(expected["byte_perplexity,none"], rel=1e-5)
    assert ours[f"bits_per_byte@{length}"] == pytest.approx(expected["bits_per_byte,none"], rel=1e-5)


def test_a_further_process_changes_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_checkpoint(model, None, tmp_path)
    config = suite.Config(windows=(16,), bos="none", keep_last_partial=True, normalise=("byte",))

    def measure(options: EvalOptions) -> SuiteResult:
        return suite.evaluate(model, tokenizer, LocalData(tmp_path, TEXTS), config, options)

    with ReplicaProcesses(tmp_path, load_checkpoint, [{"device": "cpu"}]) as replicas:
        together = measure(EvalOptions(batch_size=2, replicas=replicas))
    assert together == measure(EvalOptions(batch_size=2))
