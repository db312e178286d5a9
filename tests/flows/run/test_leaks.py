"""Training on what is measured: found for every kind of step and suite, said in one sentence, let pass where meant."""

from __future__ import annotations

import json
import logging
import types
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient

import pruning.methods.slimgpt
from evaluation.suite import DataNeed
from flows.errors import SpecError
from flows.run.leaks import Leak, check_leaks, find_leaks, trains
from flows.run.stages import plan_stages
from flows.spec.night import NightSpec
from flows.spec.run import RunSpec
from infra.settings import Settings
from infra.sources import shared_rows
from infra.sources.find import Sources, sources_from
from pruning.training.data import PlainText
from tasks.execution.context import RunContext
from tests.evaluation.local_data import arc_rows, mmlu_rows, piqa_rows, write_data
from tests.flows.home import Home

PRUNE = {"method": "slimgpt", "sparsity": 0.2}
LORA = {"recovery": "lora", "data": {"dataset": "owner/records"}}
WIKI = {"suite": "perplexity", "dataset": "owner/wiki", "config": None, "windows": [16]}


def long(word: str) -> str:
    return " ".join(f"{word}{number}" for number in range(20))


def lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """owner/records to train on, owner/wiki with a train and a test split, and questions of PIQA, ARC and MMLU."""
    root = tmp_path / "mirror"
    for name in ("owner/records", "owner/wiki", "owner/model"):
        (root / name).mkdir(parents=True)
    records = [{"instruction": long(f"q{i}x"), "input": "", "output": long(f"a{i}x")} for i in range(5)]
    (root / "owner/records/train.jsonl").write_text(lines(records))
    for split in ("train", "test"):
        (root / f"owner/wiki/{split}.jsonl").write_text(lines({"text": long(f"{split}{i}x")} for i in range(3)))
    asked = [{**row, "goal": f"{row['goal']} {long(f'piqa{i}x')}"} for i, row in enumerate(piqa_rows(8))]
    write_data(root, "baber/piqa", "plain_text", {"train": asked[4:], "validation": asked[:4]})
    write_data(root, "allenai/ai2_arc", "ARC-Easy", {"train": arc_rows(2), "test": arc_rows(3)})
    for subject in ("anatomy", "virology"):
        write_data(root, "cais/mmlu", subject, {"test": mmlu_rows(3), "dev": mmlu_rows(2)})
    return root


@pytest.fixture
def sources(mirror: Path, settings: Settings) -> Sources:
    return sources_from(str(mirror), settings)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", mirror=None)


def spec(steps: list[dict[str, Any]], evals: list[dict[str, Any]], **others: Any) -> RunSpec:
    data = {"dataset": "owner/wiki"}
    raw = {"name": "x", "model": {"id": "owner/model"}, "calibration": {"data": data}, "steps": steps, "evals": evals}
    return RunSpec.model_validate(raw | others)


def records(*texts: str) -> str:
    return lines({"instruction": text, "input": "", "output": "Yes."} for text in texts)


def test_what_has_nothing_in_common_is_no_leak(sources: Sources) -> None:
    suites = [{"suite": "zero_shot", "tasks": ["piqa", "arc_easy"]}, {"suite": "mmlu"}, WIKI]
    assert find_leaks(spec([PRUNE, LORA], suites), sources) == ()


def test_text_that_is_trained_on_and_measured(sources: Sources) -> None:
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "train+test"}}
    (leak,) = find_leaks(spec([PRUNE, step], [WIKI]), sources)
    assert (leak.step, leak.evaluation, leak.checkpoints) == ("cpt", "perplexity", ("slimgpt-20+cpt",))
    assert leak.sentence == (
        "cpt trains on owner/wiki (train+test), and perplexity measures rows of it: owner/wiki (test)"
    )


def test_another_split_is_no_leak(sources: Sources) -> None:
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "train"}}
    assert find_leaks(spec([PRUNE, step], [WIKI]), sources) == ()


def test_what_a_training_only_watches_is_no_leak(sources: Sources) -> None:
    step = {**LORA, "watch": {"dataset": "owner/wiki", "split": "test"}}
    assert find_leaks(spec([PRUNE, step], [WIKI]), sources) == ()


def test_questions_in_the_training_data_are_counted(sources: Sources, mirror: Path) -> None:
    asked = [str(row["goal"]) for row in piqa_rows(2)]
    other = [f"{long(f'piqa{i}x')} Why?" for i in (0, 3, 6)]  # the last is of the train split
    (mirror / "owner/records/train.jsonl").write_text(records(*asked, *other))
    (leak,) = find_leaks(spec([PRUNE, LORA], [{"suite": "zero_shot", "tasks": ["arc_easy", "piqa"]}]), sources)
    assert leak.sentence == (
        "lora trains on owner/records (train), and zero_shot measures baber/piqa (validation): 13 words in a row of 2 "
        f"of 4 sampled texts are in 5 sampled texts of the training data ({leak.overlap.example[:77] + '...'!r})"
    )
    assert leak.overlap.example.startswith("piqa0x")


def test_the_split_of_a_task_is_known_by_its_files(sources: Sources) -> None:
    def trained_on(split: str) -> tuple[Leak, ...]:
        data = {"dataset": "baber/piqa", "split": split, "instruction": "goal", "input": None, "output": "sol1"}
        step = {"recovery": "lora", "data": data}
        return find_leaks(spec([PRUNE, step], [{"suite": "zero_shot", "tasks": ["piqa"], "num_fewshot": 2}]), sources)

    assert trained_on("train") == (), "few-shot examples come from it, and are not scored"
    (leak,) = trained_on("validation")
    assert leak.overlap.same_rows


def test_a_folder_whose_files_alone_name_the_splits(sources: Sources, mirror: Path) -> None:
    (mirror / "cais/mmlu/README.md").unlink()
    data = {"dataset": "cais/mmlu", "instruction": "question", "input": None, "output": "question"}
    file = {"data_files": "virology/test-00000-of-00001.parquet"}
    suite = {"suite": "mmlu", "subjects": ["anatomy", "virology"]}
    (leak,) = find_leaks(spec([PRUNE, {"recovery": "lora", "data": data | file}], [suite]), sources)
    assert leak.overlap.measured == "cais/mmlu (virology, test)"
    assert (
        find_leaks(
            spec([PRUNE, {"recovery": "lora", "data": data | file}], [suite | {"subjects": ["anatomy"]}]), sources
        )
        == ()
    )


def test_calibration_that_a_reconstruction_trains_on(sources: Sources) -> None:
    pytest.importorskip("pruning.recovery.reconstruct")
    calibration = {"data": {"dataset": "owner/wiki", "split": "test"}}
    evals = [WIKI, WIKI | {"name": "before", "on": ["dense", "slimgpt-20"]}]
    (leak,) = find_leaks(spec([PRUNE, {"recovery": "reconstruct"}], evals, calibration=calibration), sources)
    assert (leak.step, leak.evaluation) == ("reconstruct", "perplexity")
    assert leak.overlap.same_rows
    assert find_leaks(spec([PRUNE, LORA], evals, calibration=calibration), sources) == (), "statistics are no training"


def test_what_follows_from_a_training_is_trained(sources: Sources) -> None:
    """Pruned before, after and in two sparsities; what was measured before the training is as it was."""
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "test"}, "name": "repaired"}
    later = {"method": "magnitude", "sparsity": 0.1, "name": "again"}
    steps = [PRUNE | {"sparsity": [0.2, 0.5]}, step, later]
    evals = [WIKI, WIKI | {"name": "first", "on": ["dense", "slimgpt-20"]}, WIKI | {"name": "last", "on": ["again-50"]}]
    leaks = find_leaks(spec(steps, evals), sources)
    assert {leak.evaluation: leak.checkpoints for leak in leaks} == {
        "perplexity": ("repaired-20", "again-20", "repaired-50", "again-50"),
        "last": ("again-50",),
    }


def test_a_method_that_trains(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not trains(spec([PRUNE], [WIKI]))
    reads = lambda config: (PlainText(dataset="owner/wiki", split="test"),)  # noqa: E731
    monkeypatch.setattr(pruning.methods.slimgpt, "reads", reads, raising=False)
    assert not trains(spec([PRUNE], [WIKI])), "a method may look at data without learning from it"
    monkeypatch.setattr(pruning.methods.slimgpt, "train", None, raising=False)
    assert trains(spec([PRUNE], [WIKI]))
    (leak,) = find_leaks(spec([PRUNE], [WIKI]), sources)
    assert (leak.step, leak.checkpoints) == ("slimgpt", ("slimgpt-20",))


def test_a_suite_without_definitions_says_what_it_needs(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation.suites import zero_shot

    need = DataNeed(repo_id="owner/wiki", split="test")
    plain = types.SimpleNamespace(Config=zero_shot.Config, needs=lambda config: (need,))
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "test"}}
    asked = spec([PRUNE, step], [{"suite": "zero_shot"}])
    monkeypatch.setattr(type(asked.evals[0]), "module", plain)
    (leak,) = find_leaks(asked, sources)
    assert leak.overlap.measured == "owner/wiki (test)"


def test_what_is_meant_is_no_leak(sources: Sources) -> None:
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "test"}}
    meant = spec([PRUNE, step], [WIKI], meant_overlaps=["owner/wiki"])
    assert find_leaks(meant, sources) == ()
    assert find_leaks(spec([PRUNE, step], [WIKI], meant_overlaps=["owner/records"]), sources)
    assert meant.model_dump()["meant_overlaps"] == ("owner/wiki",)
    assert "meant_overlaps" not in spec([PRUNE, step], [WIKI]).model_dump()


def test_data_that_cannot_be_read_is_no_leak(sources: Sources, mirror: Path, caplog: pytest.LogCaptureFixture) -> None:
    (mirror / "owner/records/train.jsonl").write_text("no JSON")
    caplog.set_level(logging.DEBUG, logger="slimline")
    assert find_leaks(spec([PRUNE, LORA], [WIKI, {"suite": "zero_shot", "tasks": ["piqa", "boolq"]}]), sources) == ()
    said = [record for record in caplog.records if "overlap is not known" in record.message]
    assert {record.levelno for record in said} == {logging.DEBUG}
    assert len(said) == 3
    assert any("no JSON" in record.message for record in said)
    assert any("aps/super_glue" in record.message for record in said), "BoolQ's data are not there"


def test_a_run_is_warned_and_a_night_refused(
    sources: Sources, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "test"}}
    context = RunContext(settings, sources)
    graph = plan_stages(spec([PRUNE, step], [WIKI]), context)
    check_leaks(graph, graph.stages, context)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "cpt trains on owner/wiki (test), and perplexity measures rows of it" in warning.message
    in_a_night = replace(context, part_of=uuid4())
    with pytest.raises(SpecError, match=r"cpt trains on owner/wiki .* meant_overlaps: \[owner/wiki\]"):
        check_leaks(graph, graph.stages, in_a_night)
    meant = plan_stages(spec([PRUNE, step], [WIKI], meant_overlaps=["owner/wiki"]), context)
    check_leaks(meant, meant.stages, in_a_night)
    assert meant.run_key == graph.run_key, "what is meant changes no result"


def test_where_nothing_is_to_be_trained_or_measured_nothing_is_read(
    sources: Sources, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = {"recovery": "cpt", "data": {"dataset": "owner/wiki", "split": "test"}}
    context = RunContext(settings, sources)
    graph = plan_stages(spec([PRUNE, step], [WIKI]), context)
    assert find_leaks(graph.spec, sources, look=False) == (), "nothing is known yet"
    compared: list[object] = []
    monkeypatch.setattr(shared_rows.SharedRows, "_same_rows", lambda self, *asked: compared.append(asked))
    monkeypatch.setattr(shared_rows.SharedRows, "_same_words", lambda *_: shared_rows.Overlap(same_rows=True))
    check_leaks(graph, [stage for stage in graph.stages if stage.action == "profile"], context)
    assert not compared
    for _ in range(2):
        check_leaks(graph, graph.stages, context)
    assert len(compared) == 1
    assert len(caplog.records) == 2, "said each time"
    assert len(find_leaks(graph.spec, sources, look=False)) == 1


def test_a_night_hands_what_is_meant_to_its_cells() -> None:
    raw = {
        "name": "n",
        "calibration": {"data": {"dataset": "owner/wiki"}},
        "matrix": {"models": [{"id": "owner/model"}], "methods": ["slimgpt"], "sparsities": [0.2]},
    }
    night = NightSpec.model_validate(raw | {"meant_overlaps": ["owner/wiki"]})
    assert night.cells[0].spec.meant_overlaps == ("owner/wiki",)
    assert "meant_overlaps" not in NightSpec.model_validate(raw).model_dump()


@pytest.mark.slow
def test_a_leak_is_recorded_with_the_figures_that_it_makes_doubtful(smoke_copy: Home) -> None:
    """In their protocol, under every table and in MLflow; and again when all is cached and nothing is read."""
    articles = "{dataset: slimline/wikipedia, split: test, instruction: title, input: null, output: text}"
    trained = [f"steps.1.data={articles}", "steps.1.num_examples=4", "steps.1.max_steps=1"]
    leaky = [part for override in ["profile=null", *trained] for part in ("--set", override)]
    sentence = "lora trains on slimline/wikipedia (test), and perplexity measures rows of it: slimline/wikipedia (test)"
    told = f"\nwarning: {sentence} [slimgpt-20+lora]\n"
    for _ in range(2):
        ran = smoke_copy.slimline("run", "smoke", *leaky)
        assert told in ran.stdout
        assert told in smoke_copy.slimline("results", "--format", "table").stdout
        (run,) = [row for row in smoke_copy.results.runs() if row.run_key in ran.stdout]
        leaks = {
            (row.checkpoint, row.suite): json.loads(row.protocol).get("leaks")
            for row in smoke_copy.results.metrics(run.run_key)
        }
        assert {place for place, said in leaks.items() if said} == {("slimgpt-20+lora", "perplexity")}
        assert leaks["slimgpt-20+lora", "perplexity"] == [sentence]
        saved = MlflowClient(smoke_copy.settings.tracking_uri).download_artifacts(str(run.mlflow_run_id), "leaks.json")
        assert json.loads(Path(saved).read_text()) == {"slimgpt-20+lora/perplexity": [sentence]}
