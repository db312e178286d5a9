"""Tokens and passwords that libraries put into their errors reach no terminal, no log, no store and no database."""

from __future__ import annotations

import base64
import json
import traceback
import urllib.request
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from flows.errors import SpecError
from flows.spec.load import load_night, load_spec, shipped_nights
from tests.flows.home import Home
from tests.infra.fake_hub import fake_hub

TOKEN = "hf_" + "aB3d" * 8
PASSWORD = "Xy7-unlikely-w0rd"
ONLY_IMPORT = ("steps=[]", "evals=[]", "profile=null", "mirror=hub", "model.id=owner/name")


def forms(secret: str) -> list[bytes]:
    return [secret.encode(), base64.b64encode(secret.encode())]


def told_to_prefect(api_url: str) -> bytes:
    """All that the server knows: flow runs, task runs, their states, logs, artifacts."""
    return b"".join(page for noun in ("flow_runs", "task_runs", "logs", "artifacts") for page in pages(api_url, noun))


def pages(api_url: str, noun: str) -> Iterator[bytes]:
    for offset in count(step=200):
        query = json.dumps({"limit": 200, "offset": offset}).encode()
        request = urllib.request.Request(f"{api_url}/{noun}/filter", query, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            page = answer.read()
        if not json.loads(page):
            return
        yield page


def files_with(folder: Path, secret: str) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and any(form in path.read_bytes() for form in forms(secret)):
            yield str(path.relative_to(folder))


def test_a_run_whose_libraries_tell_secrets_keeps_them(home: Home, offline_root: Path, tmp_path: Path) -> None:
    """The hub answers a download with the token; the password is in the URI of an MLflow server that is not there."""
    load_spec("smoke")
    from infra.offline.default import OfflineDefault

    model = OfflineDefault(offline_root).folder("slimline/tiny-random-llama")
    files = {file.name: file.read_bytes() for file in model.iterdir() if not file.name.startswith(".")}
    variables = {"HF_TOKEN": TOKEN, "HF_HOME": str(home.folder / "hf"), "SLIMLINE_RETRIES": "0", "HF_HUB_OFFLINE": "0"}
    with fake_hub("model", "owner/name", files, telling=["model.safetensors"]) as endpoint:
        home.variables.update(variables, HF_ENDPOINT=endpoint)
        overrides = [word for override in ONLY_IMPORT for word in ("--set", override)]
        home.variables["SLIMLINE_MLFLOW_URI"] = f"http://me:{PASSWORD}@127.0.0.1:9"
        home.variables["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        child = home.child("--verbose", "run", "smoke", *overrides, code=2)
    assert "no model.safetensors for Bearer ***" in child.stderr
    assert "MLflow at http://me:***@127.0.0.1:9 did not take run" in child.stderr
    (run,) = home.results.runs()
    assert "Bearer ***" in str(run.message)
    server = told_to_prefect(home.api_url)
    assert b"Bearer ***" in server
    assert b"me:***@127.0.0.1" in server
    for secret in (TOKEN, PASSWORD):
        assert secret not in child.stdout + child.stderr
        assert secret not in f"{run}{home.results.stages(run.run_key)}"
        assert not any(form in server for form in forms(secret))
        assert list(files_with(home.folder, secret)) == []


@pytest.mark.parametrize("override, place", [
    (f"model.id={TOKEN}", "model.id"),
    (f"description=use {TOKEN}", "description"),
    (f"mirror=https://me:{PASSWORD}@host/x", "mirror"),
    (f"steps.1.data.revision={TOKEN}", "steps.1.data.revision"),
    (f"evals.1.tasks=[piqa, {TOKEN}]", "evals.1.tasks.1"),
    (f"nonsense.{TOKEN}=1", "nonsense.(a key)"),
])  # fmt: skip
def test_a_spec_with_a_secret_is_refused_by_its_key(override: str, place: str) -> None:
    with pytest.raises(SpecError, match="holds a token or password; a spec is recorded") as caught:
        load_spec("smoke", [override])
    assert f"smoke: {place} holds" in str(caught.value)
    told = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in told
    assert PASSWORD not in told


def test_a_spec_with_a_secret_of_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with pytest.raises(SpecError, match=r"smoke: calibration\.join holds a token"):
        load_spec("smoke", [f"calibration.join={PASSWORD}"])


def test_a_night_with_a_secret_is_refused() -> None:
    night = next(iter(shipped_nights()))
    with pytest.raises(SpecError, match=f"{night}: description holds a token"):
        load_night(night, [f"description={TOKEN}"])


@pytest.mark.parametrize("override, sentence", [
    ("calibration.data.data_files=../../x.jsonl", "calibration.data.data_files: '../../x.jsonl' leaves the data set"),
    ("calibration.data.data_files=/etc/x.jsonl", "calibration.data.data_files: '/etc/x.jsonl' leaves the data set"),
    ("steps.1.data.config=../x", "steps.1.data.config: '../x' is no name"),
    ("evals.0.split=../x", "evals.0.split: '../x' is no name"),
    ("calibration.data.revision=../x", "calibration.data.revision: '../x' is no name of a branch"),
    ("name=../x", "name = '../x'"),
    ("steps.0.name=a/../b", "name = 'a/../b'"),
])  # fmt: skip
def test_names_in_a_spec_do_not_leave_what_they_name(override: str, sentence: str) -> None:
    from flows.run.locate import locate
    from infra.settings import load_settings
    from infra.sources.find import sources_from

    with pytest.raises(ValueError, match=r"leaves the data set|is no name|a name is made of") as caught:
        locate(load_spec("smoke", [override]), sources_from("offline", load_settings()))
    assert sentence in str(caught.value)
