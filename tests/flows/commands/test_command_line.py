"""The command as users meet it: what it prints, and its exit code.

A run as on a user's machine, the doctor and a refusal of each kind are child processes; all else is `main` called in
this one, which spares each of them the seconds that torch and Prefect take to be imported.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.run.outcome import RunResult
from flows.spec.load import shipped_specs
from infra.artifacts.store import ArtifactRef
from infra.offline.default import OfflineDefault
from tests.flows.home import Home, stages_run
from tests.flows.models import of_type, with_nan
from tests.flows.serving import alive, server_of_the_users_own

pytestmark = pytest.mark.slow  # not in `make test-fast`

NOWHERE = "http://127.0.0.1:9"
"""Port 9 is the discard service, which nobody runs: a hub that cannot be reached."""

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tiny(offline_root: Path) -> Path:
    """The tiny model's folder."""
    return OfflineDefault(offline_root).folder("slimline/tiny-random-llama")


@pytest.fixture
def idle(tmp_path: Path, offline_root: Path) -> Home:
    """A home for commands that need no Prefect server; the hub is out of reach."""
    home = Home.create(tmp_path / "home", offline_root)
    home.variables.update(HF_ENDPOINT=NOWHERE, HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_ETAG_TIMEOUT="2")
    return home


@pytest.fixture
def here(idle: Home) -> Command:
    """The command line in this process."""
    return idle.slimline


def complaint(child: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a command says what is wrong."""
    assert "Traceback" not in child.stderr
    lines = child.stderr.strip().splitlines()
    assert lines[-1].startswith("slimline: "), child.stderr
    assert [line for line in lines if line.startswith("slimline: ")] == lines[-1:]
    return lines[-1].removeprefix("slimline: ")


def only_complaint(child: subprocess.CompletedProcess[str]) -> str:
    """The same, of a command that fails before any work; the data that all tests share may just be in the making."""
    assert child.stdout == ""
    said = [line for line in child.stderr.strip().splitlines() if "/offline/" not in line]
    assert len(said) == 1, child.stderr
    return complaint(child)


def files_below(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_run_json_says_everything_in_its_last_line(
    smoke_copy: Home, smoke: tuple[Home, RunResult], prefect_home: Path
) -> None:
    """It starts a server of its own, as on a user's machine, and leaves alone another one that the user has there;
    where nothing is left to do it starts none."""
    result = smoke[1]
    (missing,) = [stage for stage in result.stages if stage.name == "evaluate:zero_shot:dense"]
    smoke_copy.delete(ArtifactRef(kind=missing.kind, key=missing.key))
    alone = Home(smoke_copy.folder, variables={"PREFECT_HOME": str(prefect_home)})
    with server_of_the_users_own(smoke_copy) as theirs:
        first = alone.child("run", "smoke")
        assert alive(theirs)
    assert stages_run(first.stderr) == [missing.name]
    before = files_below(prefect_home)
    child = alone.child("run", "smoke", "--json")
    assert files_below(prefect_home) == before
    assert child.stdout.startswith(first.stdout)
    told = json.loads(child.stdout.splitlines()[-1])
    assert told["run_key"] == result.run_key
    assert [stage["name"] for stage in told["stages"]] == [stage.name for stage in result.stages]
    assert [stage["key"] for stage in told["stages"]] == [stage.key for stage in result.stages]
    assert {stage["cached"] for stage in told["stages"]} == {True}
    assert all(stage["seconds"] > 0 for stage in told["stages"])
    assert len(told["metrics"]) == len(result.metrics)
    assert {"checkpoint", "suite", "task", "metric", "value", "stderr"} <= set(told["metrics"][0])
    assert Path(told["checkpoint"]) == smoke_copy.store.root / "checkpoint" / result.stages[3].key
    assert (Path(told["checkpoint"]) / "model.safetensors").exists()
    assert stages_run(child.stderr) == []
    said = [line for line in child.stderr.splitlines() if ": not run, " in line and line.endswith(" is cached")]
    assert len(said) == len(result.stages)
    assert [line for line in child.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)] == []
    table = child.stdout.splitlines()[0].split()
    assert table == ["dense", "slimgpt-20", "slimgpt-20+lora"]


def test_plan_says_what_would_run_and_does_nothing(smoke_copy: Home) -> None:
    before = files_below(smoke_copy.store.root)
    child = smoke_copy.slimline("plan", "smoke", "--set", "steps.1.rank=4", "--json")
    lines = child.stdout.splitlines()
    told = json.loads(lines[-1])
    to_run = {stage["name"] for stage in told["stages"] if not stage["cached"]}
    assert to_run == {stage["name"] for stage in told["stages"] if "+lora" in stage["name"]}
    assert sum(line.startswith("cached ") for line in lines) == len(told["stages"]) - len(to_run)
    assert sum(line.startswith("to run ") for line in lines) == len(to_run) + 1
    assert files_below(smoke_copy.store.root) == before
    assert len(smoke_copy.results.runs()) == 1


def test_plan_estimates_what_prunings_take_here(smoke_copy: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.devices.rates._SECONDS", 0.0)
    monkeypatch.setattr("tasks.devices.rates._FILE_BYTES", 2**22)
    child = smoke_copy.slimline("plan", "smoke", "--set", "steps.0.sparsity=0.25", "--estimate", "--json")
    told = {row["name"]: row for row in json.loads(child.stdout.splitlines()[-1])["estimates"]}
    assert not {"import-model", "calibrate"} & set(told), "they are in the store"
    assert told["recover:slimgpt-25+lora"]["seconds"] is None
    parts = told["prune:slimgpt-25"]["parts"]
    assert set(parts) == {"forward", "moments", "solve", "files", "split"}
    assert min(parts.values()) > 0
    assert sum(parts.values()) == pytest.approx(told["prune:slimgpt-25"]["seconds"])
    lines = child.stdout.splitlines()
    assert "not counted  recover:slimgpt-25+lora" in lines
    assert sum(line.endswith("; the paper: 678 s") and " LLaMA-7B at 20 %" in line for line in lines) == 1
    assert not smoke_copy.store.root.joinpath("tmp").exists()


def test_plan_of_an_empty_home_makes_nothing(idle: Home, tiny: Path) -> None:
    child = idle.slimline("plan", "smoke")
    assert "cached" not in child.stdout.replace("(never cached)", "")
    assert files_below(idle.store.root) == {}
    assert not idle.settings.results_path.exists()


def test_plan_shows_branches_as_a_tree(here: Command, tiny: Path) -> None:
    variants = "steps.0.variants={full: , uniform: {curve: uniform}, paper: {curve: log_increase}}"
    lines = here("plan", "smoke", "--set", variants, "--set", "profile=null").stdout.splitlines()
    shown = [line[8:].rpartition("  ")[0].rstrip() for line in lines if line.startswith("to run ")]
    assert shown[4:9] == [
        "  prune:full",
        "    evaluate:perplexity:full",
        "    evaluate:zero_shot:full",
        "    recover:full+lora",
        "      evaluate:perplexity:full+lora",
    ]
    assert shown[10] == "  prune:uniform"
    assert [line for line in lines if line.startswith("same ")] == [
        "same    paper is full under another name",
        "same    paper+lora is full+lora under another name",
    ]


@pytest.mark.parametrize("form", ["table", "markdown", "json", "csv"])
def test_results_in_four_forms(form: str, smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    output = home.slimline("results", "--format", form).stdout
    if form == "json":
        assert len(json.loads(output)) == len(result.metrics)
    elif form == "csv":
        assert len(list(csv.DictReader(io.StringIO(output)))) == len(result.metrics)
    else:
        assert output.count("slimgpt-20+lora") == 1
        assert "piqa acc" in output
    assert ("perplexity: " in output) == (form in ("table", "markdown"))


def test_results_of_one_run_are_found_by_name(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    assert result.run_key in home.slimline("results", "--run", "smoke").stdout
    assert "there are: smoke" in only_complaint(home.slimline("results", "--run", "smok", code=2))


def test_a_report_and_an_answer_say_what_the_results_say(smoke: tuple[Home, RunResult], tmp_path: Path) -> None:
    home, result = smoke
    wanted = {"dense", "slimgpt-20", "slimgpt-20+lora"}
    asked = home.slimline("sql", "SELECT checkpoint, ppl, num_parameters FROM leaderboard", "--format", "json")
    rows = {row["checkpoint"]: row for row in json.loads(asked.stdout)}
    assert rows.keys() == wanted
    measured = {row.checkpoint: row.value for row in result.metrics if row.metric == first_perplexity(result)}
    assert {name: row["ppl"] for name, row in rows.items()} == pytest.approx(measured)
    assert rows["dense"]["num_parameters"] > rows["slimgpt-20"]["num_parameters"] > 0
    out = tmp_path / "table.md"
    assert str(out) in home.slimline("report", "slimgpt-1", "--out", str(out)).stdout
    line = next(line for line in out.read_text().splitlines() if line.startswith("| slimgpt |") and "lora" in line)
    assert f"{measured['slimgpt-20+lora']:.2f}" in line
    missing = home.slimline("report", "slimgpt-1", "--out", str(tmp_path / "nowhere" / "table.md"), code=2)
    assert only_complaint(missing).endswith("cannot be written: give a file in a folder that exists")


def first_perplexity(result: RunResult) -> str:
    """The first perplexity of a run."""
    return next(row.metric for row in result.metrics if row.metric.startswith("ppl@"))


def test_results_of_an_empty_home_say_what_to_do(here: Command) -> None:
    assert "run a spec first" in only_complaint(here("results", code=2))


@pytest.mark.parametrize(
    "options, words",
    [
        (("--export", "lm-eval"), "--export lm-eval needs --out DIR"),
        (("--out", "somewhere"), "give --export lm-eval or every-eval-ever"),
        (("--export", "every-eval-ever", "--out", "README.md"), "--out README.md is a file: give a folder"),
    ],
)
def test_an_export_says_what_it_lacks(options: tuple[str, ...], words: str, here: Command) -> None:
    assert words in only_complaint(here("results", *options, code=2))


def test_evaluations_are_exported(smoke: tuple[Home, RunResult], tmp_path: Path) -> None:
    home, result = smoke
    printed = home.slimline("results", "--export", "lm-eval", "--out", str(tmp_path / "out")).stdout.splitlines()
    files = [Path(line) for line in printed]
    evaluated = {row.checkpoint for row in result.metrics if row.suite != "profile"}
    assert {file.parent.name for file in files} == {f"smoke__{name}" for name in evaluated}
    assert all(json.loads(file.read_text())["results"] for file in files)


@pytest.mark.parametrize(
    "noun, name",
    [
        ("methods", "slimgpt"),
        ("recoveries", "lora"),
        ("suites", "zero_shot"),
        ("families", "qwen3"),
        ("specs", "smoke"),
        ("nights", "smoke"),
    ],
)
def test_list_names_each_with_a_line(noun: str, name: str, here: Command) -> None:
    lines = here("list", noun).stdout.splitlines()
    (line,) = [line for line in lines if line.split()[0] == name]
    assert len(line.split()) > 1
    if noun == "specs":
        assert {line.split()[0] for line in lines} == set(shipped_specs())


def test_doctor_is_content_with_a_healthy_machine(idle: Home) -> None:
    output = idle.child("doctor").stdout
    assert "BAD" not in output
    for topic in ("versions", "devices", "sources", "hub", "offline default", "artifact store", "DuckDB", "MLflow"):
        assert topic in output
    assert "not reachable: use a mirror or the offline default" in output


def test_doctor_finds_what_is_broken(idle: Home) -> None:
    (idle.folder / "results").write_text("this is no folder at all")
    idle.variables["SLIMLINE_MIRROR"] = str(idle.folder / "missing")
    child = idle.child("doctor", code=2)
    bad = [line.split(":")[0] for line in child.stdout.splitlines() if line.startswith("BAD")]
    assert bad == ["BAD  sources", "BAD  results (DuckDB)"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("run", "smokee"), "did you mean 'smoke'?"),
        (("run", "smoke", "--set", "steps.0.sparsity=1.5"), "sparsity = 1.5"),
        (("run", "smoke", "--set", "stepz=1"), "did you mean 'steps'?"),
        (("plan", "smoke", "--set", "model.id=/nowhere/model"), "model path /nowhere/model does not exist"),
    ],
)
def test_a_bad_spec_costs_one_line(arguments: tuple[str, ...], sentence: str, idle: Home) -> None:
    assert sentence in only_complaint(idle.child(*arguments, code=2))


@pytest.mark.parametrize(
    "arguments", [("runn", "smoke"), ("run",), ("list", "nouns"), ("run", "smoke", "--sett", "a=1")]
)
def test_a_bad_command_line_is_a_user_error(arguments: tuple[str, ...], here: Command) -> None:
    child = here(*arguments, code=2)
    assert "Traceback" not in child.stderr
    assert "Usage" in child.stderr


def test_help_is_printed(idle: Home) -> None:
    output = idle.child("--help").stdout
    for command in ("run", "plan", "results", "list", "doctor", "ui"):
        assert command in output


@pytest.mark.parametrize(
    "overrides, sentences",
    [
        (["model.id=/nowhere/model"], ["model path /nowhere/model does not exist", "give an existing folder"]),
        (["model.id=./nowhere"], ["./nowhere does not exist"]),
        (["evals.1.tasks=[piqqa]"], ["piqqa", "did you mean 'piqa'"]),
        (["mirror=/nowhere"], ["mirror folder /nowhere does not exist"]),
        (
            ["profile.settings.prompt_len=100000"],
            ["prompt_len 100000 + new_tokens", "max_position_embeddings", "shorten"],
        ),
        (["calibration.seq_len=100000"], ["calibration.seq_len 100000 is longer than the context", "at most"]),
        (["steps.0.variants.long.calibration.seq_len=100000"], ["seq_len 100000 of variant long is longer", "at most"]),
        (["steps.0.variants.x.calibration.data.dataset=/nowhere/x"], ["dataset path /nowhere/x does not exist"]),
        (["steps.1.data.dataset=/nowhere/data"], ["dataset path /nowhere/data does not exist"]),
        (
            ["mirror=hub"],
            ["tiny-random-llama", "(1) the hub", "(2) a mirror", "(3) the offline default", "pip install"],
        ),
        (["model.id=slimline/tiny"], ["'slimline/tiny' was not found", "offline default, which has only", "Ways out"]),
    ],
)
def test_what_cannot_work_is_said_before_any_work(overrides: list[str], sentences: list[str], here: Command) -> None:
    options = [part for override in overrides for part in ("--set", override)]
    line = only_complaint(here("plan", "smoke", *options, code=2))
    for sentence in sentences:
        assert sentence in line


def test_an_unsupported_architecture_is_named_with_the_supported_ones(
    here: Command, tiny: Path, tmp_path: Path
) -> None:
    model = of_type(tiny, tmp_path / "gpt2", "gpt2", "GPT2LMHeadModel")
    line = only_complaint(here("plan", "smoke", "--set", f"model.id={model}", code=2))
    assert "unsupported architecture 'gpt2'" in line
    for family in ("llama", "mistral", "qwen2", "qwen3"):
        assert family in line


def test_a_store_that_cannot_be_written_is_named(idle: Home, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    idle.variables.update(SLIMLINE_HOME=str(tmp_path / "file" / "home"), SLIMLINE_MIRROR=str(tiny.parents[1]))
    line = only_complaint(idle.slimline("plan", "smoke", "--set", "mirror=null", code=2))
    assert str(tmp_path / "file") in line
    assert "SLIMLINE_HOME" in line


@pytest.mark.parametrize("variable, value", [("SLIMLINE_EVAL_BATCH_SIZE", "many"), ("SLIMLINE_DEVICE", "cuda:7")])
def test_a_bad_setting_is_named(variable: str, value: str, idle: Home, here: Command, tiny: Path) -> None:
    idle.variables[variable] = value
    line = only_complaint(here("plan", "smoke", code=2))
    assert variable in line
    assert value in line


def test_run_refuses_before_any_work(home: Home) -> None:
    child = home.slimline("run", "smoke", "--set", "model.id=/nowhere/model", code=2)
    assert "model path /nowhere/model does not exist" in only_complaint(child)
    assert not (home.store.root / "checkpoint").exists()


def test_a_stage_that_refuses_its_input_ends_the_run_with_two(home: Home, tiny: Path, tmp_path: Path) -> None:
    """NaN is found when the model is imported; all that follows is skipped, and the run is recorded as failed."""
    model = with_nan(tiny, tmp_path / "nan")
    child = home.slimline("run", "smoke", "--set", f"model.id={model}", "--json", code=2)
    line = complaint(child)
    assert "import-model: " in line
    assert "model.layers.2.mlp.down_proj.weight" in line
    told = json.loads(child.stdout.splitlines()[-1])
    assert {stage["status"] for stage in told["stages"]} == {"failed", "skipped"}
    assert told["checkpoint"] is None
    assert [run.status for run in home.results.runs()] == ["failed"]


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_any_work(idle: Home, small_disk: Path) -> None:
    idle.variables["SLIMLINE_HOME"] = str(small_disk / "home")
    Home.create(small_disk / "home", (idle.folder / "offline").resolve())
    (small_disk / "ballast").write_bytes(b"x" * 5_500_000)
    line = only_complaint(idle.slimline("plan", "smoke", code=2))
    assert "free" in line
    assert str(small_disk) in line
