"""Nights on the tiny model: shared stages once, failures alone, figures against the last good night, gates."""

from __future__ import annotations

import json
import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from flows.night.headlines import distinct
from flows.night.outcome import NightFailed, NightResult
from flows.spec.load import load_night
from infra.results.rows import NightFigureRow
from infra.running.files import RunningFiles
from infra.settings import Settings
from tests.flows.home import Home, stages_run

pytestmark = pytest.mark.slow

#: four cells
SMALL = [
    "name=small",
    "matrix.methods={slimgpt: {split: ffn}}",
    "matrix.recoveries.lora.max_steps=1",
    "evals.0.max_windows=4",
]


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, offline_root: Path, prefect_server: str, blank_mlflow: Path
) -> tuple[Home, NightResult, list[str]]:
    """A home after its first night, what it came to, and the stages whose artifacts were made, in order."""
    from tasks.execution import stage

    home = Home.create(tmp_path_factory.mktemp("night") / "home", offline_root, prefect_server, blank_mlflow)
    made: list[str] = []
    make = stage._make

    def noted(request: object, stage_name: str, *rest: object) -> float:
        made.append(request.ref.key)  # type: ignore[attr-defined]
        return make(request, stage_name, *rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_make", noted)
        result = home.night("smoke", SMALL)
    return home, result, made


@pytest.fixture
def later(first: tuple[Home, NightResult, list[str]], tmp_path: Path) -> Home:
    """A copy of that home, for the next night."""
    return first[0].copy(tmp_path / "home")


def verdicts(figures: tuple[NightFigureRow, ...]) -> Counter[str]:
    return Counter(row.verdict for row in figures)


def test_shared_stages_are_made_once(first: tuple[Home, NightResult, list[str]]) -> None:
    _, result, made = first
    asked = [stage.key for cell in result.cells for stage in cell.stages]
    assert len(result.cells) == 4
    assert len(asked) > len(set(asked))
    assert sorted(made) == sorted(set(asked))
    assert result.count("completed") == len(made)


def test_a_night_is_recorded(first: tuple[Home, NightResult, list[str]]) -> None:
    home, result, made = first
    (night,) = home.results.nights("small")
    assert (night.status, night.gates_passed, night.previous_night_id) == ("completed", True, None)
    assert (night.num_stages, night.num_run, night.num_cached, night.num_failed) == (len(made), len(made), 0, 0)
    assert json.loads(night.spec)["name"] == "small"
    cells = home.results.night_cells(night.night_id)
    assert [cell.cell for cell in cells] == [cell.name for cell in result.cells]
    assert {cell.run_key for cell in cells} == {run.run_key for run in home.results.runs()}
    assert home.results.night_figures(night.night_id) == result.figures
    assert verdicts(result.figures) == {"first": len(result.figures)}
    assert {row.gate for row in result.figures} == {"passed"}


def test_a_night_and_its_cells_say_what_they_are_and_how_they_ended(
    first: tuple[Home, NightResult, list[str]],
) -> None:
    home, result, _ = first
    runs = RunningFiles(home.folder).runs()
    (told,) = [run for run in runs if run.kind == "night"]
    assert (told.key, told.exit_code, list(told.cells)) == (result.night_id, 0, [cell.name for cell in result.cells])
    assert {run.name: run.exit_code for run in runs if run.part_of == told.id} == dict.fromkeys(told.cells.values(), 0)


def test_a_night_is_in_mlflow_and_a_prefect_artifact(first: tuple[Home, NightResult, list[str]]) -> None:
    from mlflow import MlflowClient

    home, result, made = first
    (night,) = home.results.nights("small")
    client = MlflowClient(home.settings.tracking_uri)
    run = client.get_run(str(night.mlflow_run_id))
    assert run.data.tags["slimline.kind"] == "night"
    assert run.data.metrics["night/num_run"] == len(made)
    page = run.data.tags["mlflow.note.content"].splitlines()
    assert page[:2] == [
        "* **Worse:** nothing to compare with, there is no good night before this one",
        "* **Failed:** nothing",
    ]
    assert page[2] == f"* **New:** all {len(distinct(result.figures))} figures"
    ids = {row.run_key: row.mlflow_run_id for row in home.results.runs()}
    for cell in result.cells:
        link = f"[`{cell.run_key}`](http://127.0.0.1:5000/#/runs/{ids[str(cell.run_key)]})"
        assert any(link in line and cell.name in line for line in page)
    cells = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {cell.data.tags["slimline.run_key"] for cell in cells} == {cell.run_key for cell in result.cells}
    for cell in cells:
        below = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{cell.info.run_id}'")
        assert "dense" in [each.info.run_name for each in below]
        assert len(below) == len({each.info.run_name for each in below})
    assert {entry.path for entry in client.list_artifacts(run.info.run_id)} == {"summary.md", "spec.json"}
    page = page_in_prefect(result)
    assert "This is the first" in page or "this is the first" in page
    assert "data:image" not in page, "one night has no history"


def page_in_prefect(result: NightResult) -> str:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as prefect:
        found = prefect.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["slimline-night-small"]))
        )
    (page,) = [str(artifact.data) for artifact in found if result.night_id in str(artifact.data)[:2000]]
    return page


def test_the_next_night_runs_nothing_and_finds_nothing_changed(
    first: tuple[Home, NightResult, list[str]], later: Home, filled: list[str]
) -> None:
    result = later.night("smoke", SMALL)
    assert filled == []
    assert result.previous_night_id == first[1].night_id
    assert verdicts(result.figures) == {"same": len(first[1].figures)}
    assert (result.count("completed"), result.count("cached")) == (0, len(first[2]))
    assert "![small, night after night](data:image/png;base64," in page_in_prefect(result)


def test_a_refreshed_stage_is_made_once_for_all_cells(later: Home, filled: list[str]) -> None:
    result = later.night("smoke", SMALL, ["evaluate:perplexity:dense"])
    assert filled == ["evaluate:perplexity:dense"]
    assert verdicts(result.figures) == {"same": len(result.figures)}


@pytest.mark.long  # runs on clusters: tests/flows/runtime/test_task_runners.py
def test_cells_run_in_the_processes_of_a_cluster(
    first: tuple[Home, NightResult, list[str]],
    tmp_path: Path,
    offline_root: Path,
    prefect_server: str,
    blank_mlflow: Path,
) -> None:
    home = Home.create(tmp_path / "cluster", offline_root, prefect_server, blank_mlflow)
    one = [part for override in [*SMALL, "matrix.sparsities=[0.5]"] for part in ("--set", override)]
    output = home.slimline("nightly", "smoke", *one, "--runner", "dask", "--json").stdout
    result = NightResult.model_validate(json.loads(output.splitlines()[-1]))
    assert result.count("completed") == len(result.stages)
    here = {(row.cell, row.checkpoint, row.metric): row.value for row in first[1].figures if "-50-" in row.cell}
    assert {(row.cell, row.checkpoint, row.metric): row.value for row in result.figures} == here


def test_worse_beyond_noise_closes_the_gate(first: tuple[Home, NightResult, list[str]], later: Home) -> None:
    """As if the last night had measured a far better model, but for one figure within its error."""
    noise, *_ = [row for row in first[1].figures if row.checkpoint == "dense"]

    def as_if(row: NightFigureRow) -> NightFigureRow:
        assert row.stderr is not None
        share = 0.1 if row.checkpoint == noise.checkpoint else 20.0
        return row.model_copy(update={"value": row.value - share * row.stderr, "stage_key": "another"})

    (night,) = later.results.nights("small")
    better = tuple(as_if(row) for row in first[1].figures)
    later.results.record_night(night, later.results.night_cells(night.night_id), better)
    with pytest.raises(NightFailed) as failed:
        later.night("smoke", SMALL)
    result = failed.value.result
    assert result.status == "completed"
    assert not result.gates_passed
    assert {row.checkpoint for row in result.figures if row.verdict == "noise"} == {"dense"}
    worse = [row for row in result.figures if row.verdict == "worse"]
    assert {row.gate for row in worse} == {"failed"}
    assert len(worse) == len(result.figures) - verdicts(result.figures)["noise"]
    assert all(row.p_value is not None and row.p_value < 1e-9 for row in worse)
    assert "beyond noise" in str(failed.value)
    assert not later.results.nights("small")[-1].gates_passed
    # a night that is not good is nobody's standard
    with pytest.raises(NightFailed) as failed:
        later.night("smoke", SMALL)
    assert failed.value.result.previous_night_id == first[1].night_id


def test_a_failed_cell_leaves_the_others_alone_and_the_next_night_runs_only_that(later: Home, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    two = [*SMALL, f"matrix.models.second={{id: {folder}}}", "matrix.sparsities=[0.2]", "matrix.recoveries={none: {}}"]
    arguments = [part for override in two for part in ("--set", override)]
    failed = later.slimline("nightly", "smoke", *arguments, code=2)
    assert stages_run(failed.stderr) == []
    assert str(folder) in failed.stderr.splitlines()[-1]
    assert "1 of 2 cells completed" in failed.stdout
    (night,) = later.results.nights("small")[1:]
    assert (night.status, night.num_failed) == ("failed", 0)
    assert str(folder) in str(night.message)
    (tiny,) = (later.folder / "offline").glob("**/tiny-random-llama")
    folder.symlink_to(tiny)
    mended = later.slimline("retry", "small")
    ran = [
        "import-model",
        "calibrate",
        "prune:slimgpt-20",
        *(f"evaluate:perplexity:{name}" for name in ("dense", "slimgpt-20")),
    ]
    assert sorted(stages_run(mended.stderr)) == sorted(ran)
    assert "2 of 2 cells completed" in mended.stdout


def test_an_interrupted_night_finishes_what_runs_and_goes_on_from_there(
    tmp_path: Path, offline_root: Path, prefect_server: str, blank_mlflow: Path
) -> None:
    """Its cells are flows in threads, which no Ctrl-C reaches by itself."""
    home = Home.create(tmp_path / "home", offline_root, prefect_server, blank_mlflow)
    slow = [*SMALL, "calibration.num_samples=500", "calibration.seq_len=128", "matrix.sparsities=[0.5]"]
    command = ["nightly", "smoke", *(part for override in slow for part in ("--set", override))]
    child = home.start(*command)
    assert child.stderr is not None
    before = ""
    while "prune:slimgpt-50: running" not in before:
        line = child.stderr.readline()
        assert line, before
        before += line
    child.send_signal(signal.SIGINT)
    after = child.stderr.read()
    assert child.wait(timeout=60) == 1
    assert "running stages are finished first" in after
    assert "prune:slimgpt-50: done" in after
    assert stages_run(after) == []
    assert home.results.runs() == ()
    assert home.results.nights() == ()
    assert not list((home.folder / "interrupted").iterdir())
    again = home.slimline(*command)
    assert not set(stages_run(again.stderr)) & set(stages_run(before))
    assert "2 of 2 cells completed" in again.stdout


def test_the_command_hands_on_what_it_parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from flows.commands import nights
    from flows.night import nightly as night_flow

    given: list[object] = []
    monkeypatch.setattr(nights, "prepared", lambda: Settings(home=tmp_path))
    monkeypatch.setattr(nights, "interruptible_command", nullcontext)
    monkeypatch.setattr(nights, "reach_prefect", lambda: None)
    monkeypatch.setattr(nights, "_print", lambda *_: None)
    monkeypatch.setattr(night_flow, "on_runner", lambda *_: lambda spec, *_: given.append(spec))
    nights.nightly("smoke", SMALL)
    assert given == [load_night("smoke", SMALL)]
    assert night_flow.nightly.validate_parameters({"spec": given[0]})["spec"] is given[0]


def test_an_unknown_stage_to_refresh_is_refused(later: Home) -> None:
    child = later.slimline("nightly", "smoke", "--refresh", "evalute", code=2)
    assert "did you mean" in child.stderr
    assert len(later.results.nights()) == 1


def test_gates_that_guard_nothing_fail(later: Home) -> None:
    gates = 'gates=[{metric: "perplexity/*", at_least: 1}, {metric: "zero_shot/*", not_worse: true}]'
    child = later.slimline("nightly", "smoke", *[part for o in [*SMALL, gates] for part in ("--set", o)], code=3)
    assert "gate zero_shot/* not_worse: it matches no figure" in child.stderr
    assert "gate perplexity/* at_least 1: passed" in child.stdout


def test_nights_are_listed_with_the_newest_one_told(later: Home) -> None:
    child = later.slimline("nights", "small")
    (night,) = later.results.nights("small")
    assert night.night_id in child.stdout
    assert "good" in child.stdout
    assert "did you mean 'small'" in later.slimline("nights", "smal", code=2).stderr
