"""Relative paths of a spec start where it was read, whoever runs it later and elsewhere; keys know nothing of it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.errors import SpecError
from flows.run.compress import open_run_context
from flows.run.stages import plan_stages
from flows.runtime.environment import make_paths_absolute
from flows.serve import automations
from flows.serve import schedule as serving
from flows.serve.schedule import Timetable, serve_specs
from flows.spec.load import dump_spec, load_night, load_spec, parse_night, parse_spec
from flows.spec.run import RunSpec
from infra.errors import SourceMissing
from infra.offline.default import OfflineDefault
from infra.settings import load_settings
from tests.flows.home import Home, stages_run

pytestmark = pytest.mark.slow  # not in `make test-fast`

ROW = json.dumps({"text": "a few words of a text " * 20, "instruction": "do", "input": "", "output": "done"})
CALIBRATION = {"data": {"dataset": "own/texts"}, "num_samples": 4, "seq_len": 16, "num_heldout": 1}
PERPLEXITY = {"suite": "perplexity", "dataset": "./texts.jsonl", "windows": [16], "max_windows": 2}
RUN = {
    "name": "own",
    "mirror": ["./mirror", "offline"],
    "model": {"id": "model"},
    "calibration": CALIBRATION,
    "steps": [
        {"method": "slimgpt", "sparsity": 0.2},
        {"recovery": "lora", "data": {"dataset": "./texts.jsonl"}, "max_steps": 1},
    ],
    "evals": [PERPLEXITY],
}
NIGHT = {
    "name": "own-night",
    "mirror": "mirror:offline",
    "calibration": CALIBRATION,
    "matrix": {"models": ["./model"], "methods": ["slimgpt"], "sparsities": [0.2]},
    "evals": [PERPLEXITY],
}


@pytest.fixture
def here(tmp_path: Path, offline_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model, texts, a mirror, and the specs that name them by relative paths."""
    folder = tmp_path / "here"
    shutil.copytree(OfflineDefault(offline_root).folder("slimline/tiny-random-llama"), folder / "model")
    for file in ("texts.jsonl", "mirror/own/texts/train.jsonl"):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(f"{ROW}\n" * 20)
    for spec in (RUN, NIGHT):
        (folder / f"{spec['name']}.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.chdir(folder)
    return folder


def keys(spec: RunSpec) -> list[str]:
    graph = plan_stages(spec, open_run_context(spec))
    return [graph.run_key, *(stage.ref.key for stage in graph.stages)]


def test_a_recorded_spec_is_the_same_from_everywhere(here: Path, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with home.lived_in():
        spec, night = load_spec("own.yaml"), load_night("own-night.yaml")
        wanted = keys(spec), keys(night.cells[0].spec)
        # as before specs noted a folder, and while it is still the current one
        assert keys(spec.model_copy(update={"folder": None})) == wanted[0]
        monkeypatch.chdir(here.parent)
        again = parse_spec(json.loads(json.dumps(spec.model_dump(mode="json"))), source="recorded")
        assert again == spec == parse_spec(yaml.safe_load(dump_spec(spec)), source="dump")
        recorded = parse_night(json.loads(json.dumps(night.model_dump(mode="json"))), source="recorded")
        assert (keys(again), keys(recorded.cells[0].spec)) == wanted


def test_a_retry_from_another_folder_reads_what_the_run_read(here: Path, home: Home) -> None:
    home.run("own.yaml", ["steps=[]", "calibration=null"])
    for report in (home.store.root / "report").iterdir():
        shutil.rmtree(report)
    child = home.slimline("retry", "own")  # in the project's folder
    assert stages_run(child.stderr) == ["evaluate:perplexity:dense"]
    (recorded,) = home.results.runs()
    assert json.loads(recorded.spec)["folder"] == str(here)


@pytest.mark.parametrize(
    ("override", "noted"),
    [
        ("model.id=./nothing", True),
        ("model.id=mirror/own", True),
        ("model.id=owner/name", False),
        ("model.id=~/model", False),
        ("model.id=/model", False),
        ("mirror=nothing", True),
        ("mirror=[hub, mirror]", True),
        ("mirror=/a:~/b:hub", False),
        ("calibration.data.dataset=../texts", True),
        ("steps.1.data.dataset=texts.jsonl", True),
        ("evals.0.dataset=texts.jsonl", True),
        ("evals.0.dataset=wikitext2", False),
        ("steps.0.variants={a: {calibration: {data: {dataset: texts.jsonl}}}}", True),
        ("description=./texts.jsonl", False),
    ],
)
def test_the_folder_is_noted_where_it_matters(override: str, noted: bool, here: Path) -> None:
    spec = load_spec("smoke", [override])
    assert spec.folder == (str(here) if noted else None)
    assert ("folder" in spec.model_dump(mode="json")) is noted


def test_a_folder_that_a_spec_names_is_left(here: Path, tmp_path: Path) -> None:
    assert load_spec("own.yaml", ["folder=/elsewhere"]).folder == "/elsewhere"
    assert load_spec("own.yaml", ["folder=~/own"]).folder == os.path.expanduser("~/own")
    with pytest.raises(SpecError, match="folder: 'own' is no absolute path; leave it out, and it is the folder"):
        load_spec("own.yaml", ["folder=own"])
    spec = load_spec("smoke", ["model.id=./model", f"folder={tmp_path}"])
    with pytest.raises(SourceMissing, match=rf"model path \./model does not exist in {tmp_path}; give"):
        keys(spec)


def test_without_a_current_folder_there_are_no_relative_paths(here: Path) -> None:
    spec = (here / "own.yaml").rename(here.parent / "own.yaml")
    shutil.rmtree(here)
    with pytest.raises(SpecError, match="relative paths start in the current folder, and that is gone"):
        load_spec(str(spec))
    assert load_spec("smoke").folder is None


def test_children_find_what_our_variables_name(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a cluster and of a schedule start in other folders."""
    monkeypatch.setenv("SLIMLINE_HOME", "home")
    monkeypatch.setenv("SLIMLINE_MIRROR", os.pathsep.join(["./mirror", "~/mirror", "/mirror", "offline"]))
    monkeypatch.setenv("SLIMLINE_RESULTS_DB", "")
    settings = load_settings()
    make_paths_absolute(settings)
    mirror = os.pathsep.join([str(here / "mirror"), os.path.expanduser("~/mirror"), "/mirror", "offline"])
    assert (os.environ["SLIMLINE_HOME"], os.environ["SLIMLINE_MIRROR"]) == (str(here / "home"), mirror)
    assert os.environ["SLIMLINE_RESULTS_DB"] == ""
    monkeypatch.chdir(here.parent)
    assert load_settings().home == settings.home


@pytest.mark.parametrize("spec", ["own.yaml", "own-night.yaml", "smoke"])
def test_what_is_served_is_read_from_where_it_was_served(
    spec: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(serving, "_server", lambda port: nullcontext("http://127.0.0.1/api"))
    monkeypatch.setattr(automations, "ensure_zombie_automation", lambda: None)
    monkeypatch.setattr(serving, "serve_until_stopped", lambda deployments, limit: served.extend(deployments))
    serve_specs([spec], Timetable())
    monkeypatch.chdir(tmp_path)
    (one,) = served
    load = load_night if "night" in spec else load_spec
    if spec == "smoke":
        assert one.parameters["overrides"] == []
    else:
        assert load(one.parameters["spec"], one.parameters["overrides"]).folder == str(here)
