"""Keeping the store in order from the command line: verify, gc, export, import, retry; and gc beside a running run."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import typer

from flows.errors import USER_ERRORS
from flows.records.retention import kept_artifacts
from flows.run.outcome import RunResult
from infra.artifacts.claims import claims_frozen, live_claims
from infra.artifacts.garbage import clear
from infra.artifacts.inventory import stored
from infra.artifacts.store import ArtifactRef
from tests.flows.home import Home, stages_run

ONLY_PRUNE = ("evals=[]", "profile=null", "steps=[{method: slimgpt, sparsity: 0.4}]")
NOW = ("--older-than", "0")

Command = Callable[..., str]


@pytest.fixture
def command(smoke_copy: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process: what it prints, or the sentence that it fails with."""
    from flows.__main__ import app

    monkeypatch.setattr("flows.commands.app.prepare_environment", lambda settings: None)

    def run(*arguments: str, home: Home = smoke_copy) -> str:
        with monkeypatch.context() as here:
            for name, value in home.environment.items():
                here.setenv(name, value)
            try:
                typer.main.get_command(app).main([*arguments], standalone_mode=False)
            except USER_ERRORS as error:
                return f"{capsys.readouterr().out}REFUSED {error}"
        return capsys.readouterr().out

    return run


def last_json(output: str) -> dict[str, object]:
    told = json.loads(output.splitlines()[-1])
    assert isinstance(told, dict)
    return told


def of(result: RunResult, name: str) -> ArtifactRef:
    (stage,) = [stage for stage in result.stages if stage.name == name]
    return ArtifactRef(kind=stage.kind, key=stage.key)


def test_a_flipped_byte_is_found_taken_out_and_made_again(
    smoke_copy: Home, smoke: tuple[Home, RunResult], command: Command, filled: list[str]
) -> None:
    pruned = of(smoke[1], "prune:slimgpt-20")
    whole = smoke_copy.store.manifest(pruned).files
    assert "13 artifacts read" in command("verify")
    weights = max(smoke_copy.store.path(pruned).glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 4
    weights.write_bytes(content)
    assert smoke_copy.store.has(pruned)  # sizes do not tell
    output = command("verify", "smoke", "--json")
    assert f"BROKEN {weights.parent}: {weights.name} has changed" in output
    assert "REFUSED 1 artifacts" in output
    assert "slimline verify --remove" in output
    assert "1 taken out" in command("verify", "--remove")
    assert not weights.exists()
    assert smoke_copy.run("smoke").run_key == smoke[1].run_key
    assert filled == ["prune:slimgpt-20"]
    assert smoke_copy.store.manifest(pruned).files[weights.name] == whole[weights.name]
    assert "0 broken" in command("verify")


def test_verify_leaves_what_is_in_use_and_takes_only_foreign_files(
    smoke_copy: Home, smoke: tuple[Home, RunResult], command: Command
) -> None:
    from infra.artifacts.claims import claimed

    report = of(smoke[1], "evaluate:perplexity:dense")
    folder = smoke_copy.store.path(report)
    (folder / "notes.txt").write_text("mine")
    with claimed(smoke_copy.store.root, [report], "a run"):
        assert "in use" in command("verify", "--remove")
        assert (folder / "notes.txt").exists()
    (smoke_copy.store.root / "elsewhere").mkdir()
    told = last_json(command("verify", "--remove", "--json"))
    assert told["left"] == []
    assert [each["path"] for each in told["litter"]] == [str(smoke_copy.store.root / "elsewhere")]  # type: ignore[attr-defined]
    assert smoke_copy.store.verify(report) == []


def test_gc_takes_what_no_kept_run_needs(smoke_copy: Home, command: Command, filled: list[str]) -> None:
    smoke_copy.run("smoke", ["name=other", *ONLY_PRUNE])
    assert filled == ["prune:slimgpt-40"]
    assert "0 things would go" in command("gc", *NOW)
    kept = ("--keep-last", "0", "--keep", "smoke")
    assert "0 things would go" in command("gc", *kept)  # too young
    listed = last_json(command("gc", *kept, *NOW, "--json"))
    assert listed["deleted"] is False
    assert [each["what"] for each in listed["garbage"]] == ["checkpoint"]  # type: ignore[attr-defined]
    assert last_json(command("gc", *kept, *NOW, "--delete", "--json"))["garbage"] == listed["garbage"]
    (gone,) = (each["name"] for each in listed["garbage"])  # type: ignore[attr-defined]
    assert not (smoke_copy.store.root / "checkpoint" / gone).exists()
    assert not (smoke_copy.folder / "prefect-results" / gone).exists()
    assert {stage.status for stage in smoke_copy.run("smoke").stages} == {"cached"}
    smoke_copy.run("smoke", ["name=other", *ONLY_PRUNE])
    assert filled == ["prune:slimgpt-40"] * 2


def test_keep_last_counts_per_name(smoke_copy: Home) -> None:
    results = smoke_copy.results
    (first,) = results.runs()
    stages = results.stages()

    def record(key: str, name: str, day: int, stage_key: str) -> None:
        moment = first.finished_at + timedelta(days=day)
        row = stages[0].model_copy(update={"run_key": key, "stage_key": stage_key})
        results.record(first.model_copy(update={"run_key": key, "name": name, "finished_at": moment}), [row])

    for day, letter in enumerate("abc", 1):
        record(f"run-x-v1-{letter}", "x", day, f"import-model-v1-{letter}")
    record("run-y-v1-d", "y", -1, "import-model-v1-d")
    smoke_keys = {stage.stage_key for stage in stages}

    def kept(number: int | None, *names: str) -> set[str]:
        return {ref.key for ref in kept_artifacts(results, keep_last=number, keep=names)}

    made = {letter: f"import-model-v1-{letter}" for letter in "abcd"}
    assert kept(None) == smoke_keys | {*made.values()}
    assert kept(2) == smoke_keys | {made["b"], made["c"], made["d"]}
    assert kept(1) == smoke_keys | {made["c"], made["d"]}
    assert kept(0) == set()
    assert kept(0, "x", "run-x-v1-a") == {made["a"], made["c"]}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("gc", "--keep", "smoke"), "--keep-last 0"),
        (("gc", "--keep-last", "0", "--keep", "smok"), "did you mean 'smoke'?"),
        (("gc", "--older-than", "soon"), "'soon' is no age"),
        (("gc", "--older-than", "5"), "'5' is no age"),
        (("verify", "smokee"), "did you mean 'smoke'?"),
        (("export", "smokee", "x.tar"), "did you mean 'smoke'?"),
        (("export", "smoke", "nowhere/x.tar"), "in a folder that exists"),
        (("import", "nowhere.tar"), "there is no file"),
        (("retry", "smokee"), "did you mean 'smoke'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(command: Command, arguments: tuple[str, ...], sentence: str) -> None:
    output = command(*arguments)
    assert "REFUSED" in output
    assert sentence in output


def test_gc_without_any_record_refuses_to_delete_everything(smoke_copy: Home, command: Command) -> None:
    for path in (smoke_copy.settings.results_path, smoke_copy.results.files.folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert "REFUSED no run is recorded" in command("gc", *NOW, "--delete")
    assert "13 things would go" in command("gc", *NOW)
    assert len(list(stored(smoke_copy.store))) == 13


def test_an_exported_run_is_cached_elsewhere(
    smoke_copy: Home,
    smoke: tuple[Home, RunResult],
    command: Command,
    tmp_path: Path,
    offline_root: Path,
    blank_mlflow: Path,
    filled: list[str],
) -> None:
    bundle = tmp_path / "smoke.tar"
    assert last_json(command("export", "smoke", str(bundle), "--json"))["artifacts"] == 13
    other = Home.create(tmp_path / "other", offline_root, smoke_copy.api_url, blank_mlflow)
    told = last_json(command("import", str(bundle), "--json", home=other))
    assert told["run_key"] == smoke[1].run_key
    assert "13 were there already" in command("import", str(bundle), home=other)
    assert command("results", "--format", "csv", home=other) == command("results", "--format", "csv")
    result = other.run("smoke")
    assert result.run_key == smoke[1].run_key
    assert {stage.status for stage in result.stages} == {"cached"}
    assert filled == []
    assert "0 broken" in command("verify", home=other)
    assert "13 artifacts kept" in command("gc", *NOW, home=other)


def test_an_artifact_that_is_gone_cannot_be_exported(
    smoke_copy: Home, smoke: tuple[Home, RunResult], command: Command, tmp_path: Path
) -> None:
    smoke_copy.delete(of(smoke[1], "profile:dense"))
    output = command("export", "smoke", str(tmp_path / "x.tar"))
    assert "REFUSED report profile-" in output
    assert "run" in output
    assert not (tmp_path / "x.tar").exists()


def test_gc_never_takes_what_a_running_run_counts_on(smoke_copy: Home, smoke: tuple[Home, RunResult]) -> None:
    """The run finds all stages but one; meanwhile everything that nobody claims is cleared, all the time."""
    smoke_copy.delete(of(smoke[1], "prune:slimgpt-20"))
    store = smoke_copy.store
    unclaimed = ArtifactRef(kind="report", key="evaluate-x-v1-0123456789abcdef")
    child = smoke_copy.start("retry", "smoke")
    cleared_while_claimed = 0
    while child.poll() is None:
        with claims_frozen(store.root):
            claims = live_claims(store.root)
        if claims:
            with store.writing(unclaimed, request={}, versions={}) as folder:
                (folder / "report.json").write_text("{}")
            gone = clear(store, lambda: (), timedelta(0)).garbage
            with claims_frozen(store.root):
                if live_claims(store.root) == claims:
                    assert {each.name for each in gone if each.ref} == {unclaimed.key}
                    cleared_while_claimed += 1
                else:
                    break  # it has just ended: from now on nothing is held
        time.sleep(0.2)  # a second process clears often, but leaves the run something of the machine
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert stages_run(errors) == ["prune:slimgpt-20"]
    assert cleared_while_claimed > 3
    assert [row.status for row in smoke_copy.results.runs()] == ["completed"]
    clear(store, lambda: (), timedelta(0))
    assert list(stored(store)) == []
    assert os.listdir(store.root / ".locks") == []
