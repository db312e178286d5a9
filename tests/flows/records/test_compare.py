"""`slimline compare` on recorded runs: who is compared with whom, what is refused, and what is printed."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.report import Average, Metric
from evaluation.samples import Sample
from flows.__main__ import main
from flows.errors import SpecError
from flows.records.compare import Comparison, ComparisonRequest, compare_checkpoints
from flows.records.compare_tables import notes
from tests.flows.recorded_runs import Evaluation, Records

RECIPE = Average(task="average", metric="acc", parts=(("piqa", "acc"), ("boolq", "acc")), weighted_by="tasks")


def answers(share: float, seed: int, task: str = "piqa", count: int = 200) -> list[Sample]:
    draw = np.random.default_rng(seed).random(count)
    return [Sample(task, item, f"{task}{item}", {"acc": float(one < share)}) for item, one in enumerate(draw)]


def windows(shift: float, seed: int = 0) -> Evaluation:
    draw = np.random.default_rng(99)
    hard, noise = draw.normal(3, 1, 60), np.random.default_rng(seed).normal(shift, 0.01, 60)
    samples = [
        Sample("wikitext", item, f"w{item}", {"ppl@128": nll}, weight=127.0)
        for item, nll in enumerate((hard + noise).tolist())
    ]
    return Evaluation(samples, suite="perplexity", protocol={"bos": "once", "windows": [128]})


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "home")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """One run: slimgpt-50 is far worse than dense, slimgpt-20 is not by its answers. To be looked at only."""
    records = Records(tmp_path_factory.mktemp("shared") / "home")
    records.add(
        "demo",
        {
            "dense": [Evaluation(answers(0.7, 1)), windows(0.0)],
            "slimgpt-20": [Evaluation(answers(0.73, 1)), windows(0.05, 1)],
            "slimgpt-50": [Evaluation(answers(0.4, 2)), windows(1.0, 2)],
        },
    )
    return records


@pytest.fixture
def demo(shared: Records, records: Records) -> Records:
    """A copy of it, to be added to."""
    shutil.copytree(shared.folder, records.folder)
    return records


def ask(records: Records, *names: str, suite: str | None = None, alpha: float = 0.05) -> Comparison:
    return compare_checkpoints(ComparisonRequest(*names, suite=suite, alpha=alpha), records.results, records.store)


def verdicts(comparison: Comparison) -> dict[tuple[str, str, str], str]:
    return {(*each.labels, each.row.metric): each.verdict for each in comparison.rows}


def test_every_checkpoint_of_a_run_is_compared_with_its_dense_model(shared: Records) -> None:
    found = ask(shared, "demo")
    assert verdicts(found) == {
        ("slimgpt-20", "dense", "acc"): "noise",
        ("slimgpt-20", "dense", "ppl@128"): "worse",
        ("slimgpt-50", "dense", "acc"): "worse",
        ("slimgpt-50", "dense", "ppl@128"): "worse",
    }
    assert found.problems == found.without_samples == ()


def test_rows_have_the_figures_of_the_report(shared: Records) -> None:
    rows = {(row.checkpoint, row.metric): row.value for row in shared.results.metrics()}
    for each in ask(shared, "demo").rows:
        assert each.row.value == rows[each.row.checkpoint, each.row.metric]
        assert each.row.reference_value == rows["dense", each.row.metric]
        assert each.row.difference == each.row.value - each.row.reference_value
        assert each.row.low <= each.row.difference <= each.row.high


def test_one_checkpoint_one_suite(shared: Records) -> None:
    (each,) = ask(shared, "demo:slimgpt-50", suite="perplexity").rows
    assert (each.labels, each.row.metric) == (("slimgpt-50", "dense"), "ppl@128")
    (each,) = ask(shared, "demo:dense", "demo:slimgpt-50", suite="perplexity").rows
    assert (each.labels, each.verdict) == (("dense", "slimgpt-50"), "better")


def test_two_runs_are_compared_by_the_names_of_their_checkpoints(demo: Records) -> None:
    demo.add("lora", {"dense": [Evaluation(answers(0.7, 1))], "slimgpt-50": [Evaluation(answers(0.6, 2))]})
    found = verdicts(ask(demo, "lora", "demo"))
    assert found == {
        ("lora:dense", "demo:dense", "acc"): "same",
        ("lora:slimgpt-50", "demo:slimgpt-50", "acc"): "better",
    }
    assert list(verdicts(ask(demo, "lora:slimgpt-50", "demo"))) == [("lora:slimgpt-50", "demo:slimgpt-50", "acc")]
    assert len(verdicts(ask(demo, "demo", "lora:dense"))) == 3


def test_two_runs_of_one_spec_are_told_apart_by_their_keys(records: Records) -> None:
    old = records.add("demo", {"dense": [Evaluation(answers(0.7, 1))]})
    new = records.add("demo", {"dense": [Evaluation(answers(0.5, 1))]}, version=1)
    (each,) = ask(records, "demo", old).rows
    assert (each.labels, each.verdict) == ((f"{new}:dense", f"{old}:dense"), "worse")
    assert (each.row.run_key, each.row.reference) == (new, f"{old}:dense")


def test_a_correction_for_many_tests(shared: Records) -> None:
    assert set(verdicts(ask(shared, "demo", alpha=0.0)).values()) == {"noise"}


def test_averages_are_paired_if_the_report_says_what_they_are_of(records: Records) -> None:
    def evaluation(share: float, averages: tuple[Average, ...]) -> Evaluation:
        samples = [*answers(share, 1), *answers(share, 2, "boolq", 100)]
        bare = Evaluation(samples)
        mean = sum(metric.value for metric in bare.metrics) / 2
        more = Metric(task="average", metric="acc", value=mean, higher_is_better=True)
        return replace(bare, averages=averages, more=(more,))

    records.add("with", {"dense": [evaluation(0.7, (RECIPE,))], "small": [evaluation(0.5, (RECIPE,))]})
    records.add("without", {"dense": [evaluation(0.7, ())], "small": [evaluation(0.5, ())]})
    rows = ask(records, "with").rows
    assert [(each.row.task, each.row.num_items, each.verdict) for each in rows] == [
        ("piqa", 200, "worse"),
        ("boolq", 100, "worse"),
        ("average", 300, "worse"),
    ]
    found = ask(records, "without")
    assert [each.row.task for each in found.rows] == ["piqa", "boolq"]
    assert found.without_samples == ("zero_shot/average/acc",)


def test_what_was_measured_otherwise_is_refused_with_the_difference(demo: Records) -> None:
    other = replace(windows(0.0), protocol={"bos": "none", "windows": [128]})
    demo.add("other", {"dense": [Evaluation(answers(0.7, 1)), other]})
    found = ask(demo, "demo:dense", "other:dense")
    assert [each.row.suite for each in found.rows] == ["zero_shot"]
    assert found.problems == (
        'perplexity of demo:dense and other:dense was not measured alike: bos is "once" in the one and "none" in the '
        "other; measure one of them again as the other was",
    )
    with pytest.raises(SpecError, match="nothing can be compared: perplexity of demo:dense"):
        ask(demo, "demo:dense", "other:dense", suite="perplexity")


def test_what_changes_no_figure_is_no_difference(records: Records) -> None:
    for name, count in {"few": 100, "many": 1000}.items():
        records.add(name, {"dense": [Evaluation(answers(0.7, 1), protocol={"bootstrap_iters": count})]})
    assert set(verdicts(ask(records, "few", "many")).values()) == {"same"}


ASKED: dict[str, Any] = {"bos": "once", "windows": [128], "normalise": [], "measured": {"128": {"windows": 60}}}


@pytest.mark.parametrize(
    "other",
    [
        {"windows": [128, 1024], "measured": {"128": {"windows": 60}, "1024": {"windows": 7}}},
        {"normalise": ["word"], "measured": {"128": {"windows": 60, "words": 900}}},
        {"data_identity": {"wikitext": "sha256:1"}},
        {"data_identity": {"wikitext": "sha256:2"}, "versions": {"torch": "2.9"}},
        {"leaks": ["lora trains on wikitext, and perplexity measures rows of it"]},
    ],
)
def test_what_says_nothing_of_a_figure_refuses_none(records: Records, other: dict[str, Any]) -> None:
    records.add("one", {"dense": [replace(windows(0.0), protocol=ASKED)]})
    records.add("two", {"dense": [replace(windows(0.2), protocol=ASKED | other)]})
    (found,) = ask(records, "one", "two").rows
    assert (found.row.metric, found.verdict) == ("ppl@128", "better")


@pytest.mark.parametrize(
    "other", [{"dataset": "c4"}, {"bos": "none"}, {"stride": 64}, {"dtype": "torch.float16"}, {"max_windows": 8}]
)
def test_what_says_how_a_figure_was_taken_still_refuses_it(records: Records, other: dict[str, Any]) -> None:
    taken = ASKED | {"dataset": "wikitext", "stride": 128, "dtype": "torch.float32", "max_windows": None}
    records.add("one", {"dense": [replace(windows(0.0), protocol=taken)]})
    records.add("two", {"dense": [replace(windows(0.2), protocol=taken | other)]})
    with pytest.raises(SpecError, match=f"was not measured alike: {next(iter(other))} is"):
        ask(records, "one", "two")


def test_windows_of_lengths_that_only_one_has_are_told(records: Records) -> None:
    long = [replace(s, scores={"ppl@1024": s.scores["ppl@128"]}) for s in windows(0.0).samples]
    two = replace(windows(0.0), samples=long, protocol=ASKED | {"windows": [1024]})
    records.add("one", {"dense": [Evaluation(answers(0.7, 1)), replace(windows(0.0), protocol=ASKED)]})
    records.add("two", {"dense": [Evaluation(answers(0.7, 1)), two]})
    found = ask(records, "one", "two")
    assert [each.row.suite for each in found.rows] == ["zero_shot"]
    assert found.problems == ("perplexity of one:dense and two:dense has no figure in common",)


def test_each_figure_has_the_versions_that_differ(records: Records) -> None:
    def evaluations(**versions: str) -> list[Evaluation]:
        said = {**windows(0.0).protocol, "versions": versions}
        return [Evaluation(answers(0.7, 1)), replace(windows(0.0), protocol=said)]

    records.add("one", {"dense": evaluations(torch="2.9", transformers="5.23.0")})
    records.add("two", {"dense": evaluations(torch="2.9", transformers="5.24.0", datasets="4.1")})
    records.add("old", {"dense": [Evaluation(answers(0.7, 1)), windows(0.0)]})
    found = ask(records, "one", "two")
    assert {each.row.suite: dict(each.other_versions) for each in found.rows} == {
        "zero_shot": {},
        "perplexity": {"transformers": ("5.23.0", "5.24.0"), "datasets": (None, "4.1")},
    }
    told = [line for line in notes(found, 0.05) if "versions" in line]
    assert told == [
        "measured with other versions: transformers 5.23.0 / 5.24.0, datasets not recorded / 4.1 "
        "(perplexity of one:dense and two:dense)"
    ]
    (_, since) = ask(records, "old", "one").rows
    assert dict(since.other_versions) == {"torch": (None, "2.9"), "transformers": (None, "5.23.0")}


def test_agreement_with_another_dense_model_is_refused(records: Records) -> None:
    for name in ("one", "two"):
        records.add(name, {"small": [replace(windows(0.1), suite="agreement", reference=name)]})
    with pytest.raises(SpecError, match="dense model that they were measured against is another"):
        ask(records, "one", "two")


def test_items_that_differ_are_refused_with_their_number(records: Records) -> None:
    other = [replace(sample, item_hash="x") for sample in answers(0.7, 1)[:50]]
    records.add("demo", {"dense": [Evaluation(answers(0.7, 1))], "small": [Evaluation(other)]})
    with pytest.raises(
        SpecError, match=r"zero_shot/piqa/acc: the items differ: 50 beside 200, of which 150 .* 50 were"
    ):
        ask(records, "demo")


def test_a_figure_that_is_not_the_mean_of_its_samples_is_refused(records: Records) -> None:
    odd = Metric(task="piqa", metric="f1", value=0.9, higher_is_better=True)
    samples = [replace(s, scores={"f1": s.scores["acc"]}) for s in answers(0.5, 1)]

    class Corpus(Evaluation):
        metrics = (odd,)

    records.add("demo", {"dense": [Corpus(samples)], "small": [Corpus(samples)]})
    with pytest.raises(SpecError, match="zero_shot/piqa/f1: the figure is not the mean of its samples"):
        ask(records, "demo")


def test_samples_that_were_collected_away(demo: Records) -> None:
    ref = demo.report(demo.results.runs()[0].run_key, "dense", "perplexity")
    with demo.store.trash() as trash:
        assert demo.store.discard(ref, trash)
    found = ask(demo, "demo")
    assert {each.row.suite for each in found.rows} == {"zero_shot"}
    assert found.problems == (
        f"the samples of perplexity of dense are no longer in the store (slimline gc collects them with the report "
        f"{ref.key}); run spec demo again",
    )


def test_what_a_lost_report_was_measured_against_is_no_reason(records: Records) -> None:
    """Both were measured against one dense model; what is missing is the report of the second."""
    keys = [
        records.add(name, {"small": [replace(windows(0.1), suite="agreement", reference="import-dense")]})
        for name in ("one", "two")
    ]
    ref = records.report(keys[1], "small", "agreement")
    with records.store.trash() as trash:
        assert records.store.discard(ref, trash)
    with pytest.raises(SpecError, match=r"agreement of two:small are no longer in the store .*; run spec two again"):
        ask(records, "one", "two")


def test_an_average_with_a_part_that_cannot_be_compared(records: Records) -> None:
    def evaluation(count: int) -> Evaluation:
        figure = Metric(task="average", metric="acc", value=0.7, higher_is_better=True)
        samples = [*answers(0.7, 1), *answers(0.6, 2, "boolq", count)]
        return Evaluation(samples, averages=(RECIPE,), more=(figure,))

    records.add("demo", {"dense": [evaluation(200)], "small": [evaluation(199)]})
    found = ask(records, "demo")
    assert [each.row.task for each in found.rows] == ["piqa"]
    assert found.problems[1:] == ("zero_shot/average/acc: its part boolq/acc could not be compared",)
    assert found.without_samples == ()


def test_reports_of_before_samples_were_kept(records: Records) -> None:
    key = records.add("demo", {"dense": [Evaluation(answers(0.7, 1))], "small": [Evaluation(answers(0.6, 1))]})
    ref = records.report(key, "small", "zero_shot")
    shutil.rmtree(records.store.path(ref))
    with records.store.writing(ref, request={}, versions={}, replace=True) as folder:
        (folder / "report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SpecError, match=r"no samples that can be read.* --refresh evaluate:zero_shot"):
        ask(records, "demo")


@pytest.fixture(scope="module")
def several(shared: Records, tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Three more runs. To be looked at only."""
    records = Records(tmp_path_factory.mktemp("several") / "home")
    shutil.copytree(shared.folder, records.folder)
    records.add("other", {"base": [Evaluation(answers(0.5, 1), suite="mmlu")]})
    records.add("only-dense", {"dense": [Evaluation(answers(0.5, 1))]}, version=1)
    records.add("nothing", {}, version=2)
    return records


@pytest.mark.parametrize(
    "names, words",
    [
        (("dmeo",), "no run 'dmeo'; did you mean 'demo'"),
        (("demo:slimgpt-2",), "no measured checkpoint 'slimgpt-2'; did you mean 'slimgpt-20'"),
        (("demo", "demo:nothing"), "it has: dense, slimgpt-20, slimgpt-50"),
        (("demo", "other"), "have measured no checkpoint of the same name; name one of each: demo:dense"),
        (("demo:dense", "other:base"), "demo:dense was measured by zero_shot, perplexity and other:base by mmlu"),
        (("other",), "no measured checkpoint 'dense'"),
        (("only-dense",), "no checkpoint but dense; name another run"),
        (("nothing",), "has measured nothing that has samples"),
    ],
)
def test_questions_without_an_answer(several: Records, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        ask(several, *names)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_suite_and_empty_store(demo: Records, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no evaluation 'perplexty'; did you mean 'perplexity'"):
        ask(demo, "demo", suite="perplexty")
    with pytest.raises(SpecError, match=r"there are no results in .* yet"):
        ask(Records(tmp_path / "empty"), "demo")


Command = Callable[..., tuple[str, str]]


@pytest.fixture
def command(records: Records, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """The command line in this process."""
    logger = logging.getLogger("slimline")
    before = (logger.handlers, logger.propagate, logger.level, dict(os.environ), warnings.filters[:])

    def run(*arguments: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["slimline", "compare", *arguments])
        os.environ["SLIMLINE_HOME"] = str(records.folder)
        with pytest.raises(SystemExit) as left:
            main()
        assert (left.value.code or 0) == code
        printed = capsys.readouterr()
        return printed.out, printed.err

    yield run
    logger.handlers, logger.propagate, logger.level = before[:3]
    os.environ.clear()
    os.environ.update(before[3])
    warnings.filters[:] = before[4]


def test_the_table_of_the_command(demo: Records, command: Command) -> None:
    out, _ = command("demo", "--suite", "zero_shot")
    tables, notes = out.split("\n\nverdict: ")
    first, second = tables.split("\n\n")
    head, row = second.splitlines()
    assert head.split()[:5] == ["suite", "task", "metric", "slimgpt-50", "dense"]
    assert row.split()[:3] == ["zero_shot", "piqa", "acc"]
    assert "worse" in row
    assert "noise" in first
    assert notes.startswith("2 tests, Holm-corrected at level 0.05")


def test_under_the_table_stands_how_the_figures_were_taken(demo: Records, command: Command) -> None:
    demo.add(
        "lora", {"dense": [windows(0.0), Evaluation(answers(0.7, 1), suite="gone")]}, spec={"model": {"name": "tiny"}}
    )
    for form in ("table", "markdown"):
        out, _ = command("lora", "demo", "--format", form)
        assert out.splitlines()[-3:] == [
            "protocol of lora (run-lora-v1-0000000000000000):",
            'model: name "tiny"',
            'perplexity: bos "once", windows [128]',
        ]
        out, _ = command("demo", "--format", form)
        assert [line.partition(":")[0] for line in out.splitlines()[-2:]] == ["zero_shot", "perplexity"]
    for form in ("json", "csv"):
        assert "protocol of" not in "".join(command("demo", "--format", form))


def test_other_versions_are_said_under_the_table(demo: Records, command: Command) -> None:
    new = replace(windows(0.0), protocol={**windows(0.0).protocol, "versions": {"transformers": "5.24.0"}})
    old = replace(windows(0.0), protocol={**windows(0.0).protocol, "versions": {"transformers": "5.23.0"}})
    demo.add("old", {"dense": [old]})
    demo.add("new", {"dense": [new]})
    for form in ("table", "markdown"):
        out, _ = command("old", "new", "--format", form)
        assert "\nmeasured with other versions: transformers 5.23.0 / 5.24.0\n" in out
        assert "other versions" not in command("demo", "--format", form)[0]
    assert json.loads(command("old", "new", "--format", "json")[0])[0]["other_versions"] == {
        "transformers": ["5.23.0", "5.24.0"]
    }
    (row,) = csv.DictReader(io.StringIO(command("old", "new", "--format", "csv")[0]))
    assert row["other_versions"] == "transformers 5.23.0 / 5.24.0"
    assert json.loads(command("demo", "--format", "json")[0])[0]["other_versions"] == {}


def test_forms_for_programs(demo: Records, command: Command) -> None:
    out, told = command("demo", "--format", "json")
    rows = json.loads(out)
    assert [(row["a"], row["b"], row["metric"]) for row in rows][:2] == [
        ("slimgpt-20", "dense", "acc"),
        ("slimgpt-20", "dense", "ppl@128"),
    ]
    assert rows[0]["flips_lost"] == 0
    assert "Holm" in told
    out, _ = command("demo", "--format", "csv")
    assert [row["verdict"] for row in csv.DictReader(io.StringIO(out))] == [row["verdict"] for row in rows]
    out, _ = command("demo", "--format", "markdown")
    assert {line.count("|") for line in out.split("\n\nverdict")[0].splitlines() if line} == {13}


def test_a_mistake_is_one_sentence_and_code_2(demo: Records, command: Command) -> None:
    _, told = command("dmeo", code=2)
    assert told == "slimline: no run 'dmeo'; did you mean 'demo'?; there are: demo\n"


def test_a_bar_in_a_name_is_no_column_of_markdown(records: Records, command: Command) -> None:
    records.add(
        "demo", {name: [Evaluation(answers(share, 1, "my|task"))] for name, share in {"dense": 0.7, "a": 0.5}.items()}
    )
    out, _ = command("demo", "--format", "markdown")
    head, _, row = out.split("\n\nverdict")[0].splitlines()
    assert row.startswith("| zero_shot | my\\|task | acc |")
    assert len(row.replace("\\|", "").split("|")) == len(head.split("|"))
