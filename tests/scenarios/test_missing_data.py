"""Data that is not there costs its own evaluation: the others are measured and recorded, and only it is run again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from flows.run import preflight
from flows.run.compress import open_run_context
from flows.run.stages import plan_stages
from flows.spec.load import load_spec
from infra.errors import SourceUnreadable
from infra.offline.default import OfflineDefault
from infra.sources.find import Sources
from tasks.execution.stage import importing
from tests.flows.home import Home, stages_run

TASKS = {
    "boolq": "aps/super_glue",
    "piqa": "baber/piqa",
    "hellaswag": "Rowan/hellaswag",
    "winogrande": "allenai/winogrande",
    "arc_easy": "allenai/ai2_arc",
    "openbookqa": "allenai/openbookqa",
}


@pytest.fixture
def mirror(tmp_path: Path, offline_root: Path) -> Path:
    offline = OfflineDefault(offline_root)
    for repo_id in ("slimline/tiny-random-llama", "slimline/wikipedia", *TASKS.values()):
        link = tmp_path / "mirror" / repo_id
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(offline.folder(repo_id))
    return tmp_path / "mirror"


@pytest.fixture
def spec(tmp_path: Path, mirror: Path) -> Path:
    wikipedia = {"dataset": "slimline/wikipedia", "config": None, "windows": [64], "max_windows": 2}
    suites = [{"suite": "zero_shot", "name": task, "tasks": [task], "limit": 4} for task in TASKS]
    text = {
        "name": "seven",
        "mirror": str(mirror),
        "model": {"id": "slimline/tiny-random-llama"},
        "evals": [{"suite": "perplexity", **wikipedia}, *suites],
    }
    path = tmp_path / "seven.yaml"
    path.write_text(yaml.safe_dump(text), encoding="utf-8")
    return path


def test_six_of_seven_suites_are_recorded_and_only_the_failed_one_is_run_again(
    home: Home, spec: Path, mirror: Path
) -> None:
    lost = mirror / TASKS["openbookqa"]
    folder = lost.readlink()
    lost.unlink()
    failed = home.slimline("run", str(spec), code=2)
    lines = failed.stderr.splitlines()
    (warned,) = (number for number, line in enumerate(lines) if "will fail for want of data" in line)
    assert "evaluate:openbookqa:dense" in lines[warned]
    assert warned < min(number for number, line in enumerate(lines) if ": running, " in line)
    assert f"{mirror}" in lines[-1]
    assert "allenai/openbookqa" in lines[-1]
    (run,) = home.results.runs()
    assert run.status == "failed"
    others = {"perplexity", *TASKS} - {"openbookqa"}
    assert {row.suite for row in home.results.metrics(run.run_key)} == others
    lost.symlink_to(folder)
    mended = home.slimline("run", str(spec))
    assert stages_run(mended.stderr) == ["evaluate:openbookqa:dense"]
    newest = home.results.runs()[-1]
    assert newest.status == "completed"
    assert {row.suite for row in home.results.metrics(newest.run_key)} == {"perplexity", *TASKS}


def test_with_no_data_at_all_nothing_is_run(home: Home, spec: Path, mirror: Path) -> None:
    for repo_id in TASKS.values():
        (mirror / repo_id).unlink()
    child = home.slimline("run", str(spec), "--set", "evals=[{suite: zero_shot, limit: 4}]", code=2)
    assert stages_run(child.stderr) == []
    assert "aps/super_glue" in child.stderr


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("dataset=slimline/wikipedai", "slimline/wikipedai"),
        ("split=tset", "has no split 'tset'; did you mean 'test'"),
        ("text_field=txt", "has no column 'txt'"),
    ],
)
def test_data_that_the_spec_names_wrongly_is_refused_at_once(home: Home, spec: Path, named: str, said: str) -> None:
    child = home.slimline("plan", str(spec), "--set", f"evals.0.{named}", code=2)
    assert said in child.stderr.splitlines()[-1]


def test_data_is_looked_at_while_no_other_thread_imports(
    home: Home, spec: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` fails in one cell of a night while a stage of another cell imports transformers."""
    held: list[bool] = []
    tables: list[bool] = []
    monkeypatch.setattr(Sources, "check_columns", lambda *_: held.append(importing.locked()))
    monkeypatch.setattr(Sources, "check_tables", lambda *_: tables.append(importing.locked()))
    with home.lived_in():
        for loaded in (load_spec("smoke"), load_spec(str(spec))):
            run_context = open_run_context(loaded)
            preflight.check(plan_stages(loaded, run_context), run_context)
    assert len(held) >= 4, "smoke's perplexity, calibration and training records, and the other's perplexity"
    assert all(held)
    assert len(tables) >= len(TASKS)
    assert all(tables)


def test_damaged_task_data_costs_its_own_evaluation_and_is_said_first(
    home: Home, spec: Path, mirror: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The user's file, not the folder in which lm-eval's tasks are told where their data lies."""
    link = mirror / TASKS["piqa"]
    folder = link.readlink()
    link.unlink()
    shutil.copytree(folder, link)
    (damaged,) = link.rglob("validation-*.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    sentence = f"{damaged} cannot be read: Parquet magic bytes not found in footer"
    with home.lived_in():
        asked = load_spec(
            str(spec), ["evals=[{suite: zero_shot, tasks: [piqa]}, {suite: zero_shot, name: b, tasks: [boolq]}]"]
        )
        run_context = open_run_context(asked)
        preflight.check(plan_stages(asked, run_context), run_context)
        assert [sentence in record.message for record in caplog.records] == [True, False]
        assert caplog.records[1].message.endswith("the others are run: evaluate:zero_shot:dense")
        asked = load_spec(str(spec), ["evals=[{suite: zero_shot, tasks: [piqa]}]"])
        with pytest.raises(SourceUnreadable, match=sentence):
            preflight.check(plan_stages(asked, run_context), run_context)
