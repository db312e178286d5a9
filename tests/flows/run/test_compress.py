"""The smoke spec with real Prefect, MLflow and DuckDB: what runs, what does not, and what is recorded."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from safetensors.torch import load_file
from torch import Tensor

from evaluation.errors import EvaluationError
from flows.errors import SpecError
from flows.run.outcome import RunResult, StagesFailed
from infra.artifacts.store import MANIFEST, ArtifactRef
from infra.provenance import versions
from infra.sources.fingerprints import stamp
from tasks.devices import model_cache
from tasks.execution.curves import InRun
from tests.flows.home import Home

QUICK = ("profile=null",)
"""A profile takes longer than all the rest of the smoke run: its child processes import torch."""

CHECKPOINTS = ("dense", "slimgpt-20", "slimgpt-20+lora")
STAGES = [
    "import-model",
    "calibrate",
    "prune:slimgpt-20",
    "recover:slimgpt-20+lora",
    *(f"evaluate:{suite}:{name}" for suite in ("perplexity", "zero_shot") for name in CHECKPOINTS),
    *(f"profile:{name}" for name in CHECKPOINTS),
]


def weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in however many files."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def statuses(result: RunResult) -> dict[str, str]:
    return {stage.name: stage.status for stage in result.stages}


def not_cached(result: RunResult) -> set[str]:
    return {stage.name for stage in result.stages if not stage.cached}


def only_run_of(home: Home, result: RunResult) -> FlowRunFilter:
    """Selects the newest flow run of a result on Prefect's server."""
    (run,) = [row for row in home.results.runs() if row.run_key == result.run_key]
    return FlowRunFilter(id=FlowRunFilterId(any_=[run.prefect_run_id]))


def prefect_tasks(home: Home, result: RunResult) -> list[TaskRun]:
    (run,) = [row for row in home.results.runs() if row.run_key == result.run_key]
    assert run.prefect_run_id
    with get_client(sync_client=True) as client:
        found = client.read_task_runs(flow_run_filter=only_run_of(home, result))
        ended = client.read_flow_run(UUID(run.prefect_run_id)).end_time
    # Prefect counts to a flow run what is called later, outside of any flow, in the process that ran it: another test
    return [task for task in found if ended is None or task.expected_start_time <= ended]


def prefect_states(home: Home, result: RunResult) -> dict[str, str | None]:
    return {task.name: task.state_name for task in prefect_tasks(home, result)}


def mlflow_client(home: Home) -> MlflowClient:
    return MlflowClient(home.settings.tracking_uri)


def mlflow_run_id(home: Home, result: RunResult) -> str:
    (run,) = [row for row in home.results.runs() if row.run_key == result.run_key]
    assert run.mlflow_run_id
    return run.mlflow_run_id


def checkpoint_runs(home: Home, result: RunResult) -> dict[str, Run]:
    """The MLflow runs of the checkpoints by name, which are below that of the run."""
    client, run_id = mlflow_client(home), mlflow_run_id(home, result)
    experiment = client.get_run(run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len(found) == len({run.info.run_name for run in found})
    return {run.info.run_name: run for run in found}


def points(home: Home, result: RunResult) -> dict[str, list[tuple[int, float]]]:
    """Every metric of every checkpoint, below its name, with its whole history."""
    client = mlflow_client(home)
    return {
        f"{name}/{key}": [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        for name, run in checkpoint_runs(home, result).items()
        for key in run.data.metrics
    }


def test_every_stage_of_the_smoke_spec_completes(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    assert [stage.name for stage in result.stages] == STAGES
    assert set(statuses(result).values()) == {"completed"}
    assert all(stage.seconds is not None and stage.seconds > 0 for stage in result.stages)
    assert result.failures == ()
    assert result.checkpoint == str(home.store.root / "checkpoint" / result.stages[3].key)
    assert (Path(result.checkpoint) / "plan.json").exists()


def test_the_smoke_run_measured_what_was_asked(smoke: tuple[Home, RunResult]) -> None:
    _, result = smoke
    figures = {(row.checkpoint, row.suite, row.task, row.metric): row.value for row in result.metrics}
    for name in CHECKPOINTS:
        assert 1 < figures[name, "perplexity", "wikipedia", "ppl@64"] < 1e5
        assert 0 <= figures[name, "zero_shot", "piqa", "acc"] <= 1
        assert figures[name, "profile", "profile", "decode_ms_per_token_p50"] > 0
        assert figures[name, "profile", "profile", "peak_memory_gib"] > 0
    dense = figures["dense", "profile", "profile", "num_decoder_parameters"]
    for name in CHECKPOINTS[1:]:
        assert figures[name, "profile", "profile", "num_decoder_parameters"] / dense == pytest.approx(0.8, abs=0.02)
    assert {row.num_examples for row in result.metrics if row.suite == "zero_shot"} == {10}


def test_duckdb_has_the_run(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    (run,) = home.results.runs()
    assert (run.run_key, run.name, run.status, run.message) == (result.run_key, "smoke", "completed", None)
    assert run.started_at < run.finished_at
    assert run.prefect_run_id
    assert [(row.name, row.stage_key) for row in home.results.stages(result.run_key)] == [
        (stage.name, stage.key) for stage in result.stages
    ]
    assert sorted(map(str, home.results.metrics(result.run_key))) == sorted(map(str, result.metrics))
    layers = home.results.layers(result.run_key)
    assert {(row.layer, row.sub_layer) for row in layers} == {(n, s) for n in range(4) for s in ("attention", "mlp")}
    assert {row.stage_key for row in layers} == {result.stages[2].key}
    assert all(0 <= row.sparsity < 1 and row.kept <= row.total for row in layers)
    assert any(row.sparsity > 0 for row in layers)
    curves = [(row.stage_key, row.step) for row in home.results.curves(result.run_key) if row.metric == "train_loss"]
    assert curves == [(result.stages[3].key, step) for step in (1, 2, 3, 4)]


def test_mlflow_has_the_run(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    client, run_id = mlflow_client(home), mlflow_run_id(home, result)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["model"] == "slimline/tiny-random-llama"
    assert run.data.params["sparsity"] == "0, 0.2"
    spec = json.loads(Path(client.download_artifacts(run_id, "spec.json")).read_text())
    assert (spec["steps"][0]["sparsity"], spec["steps"][1]["rank"]) == (0.2, 8)
    assert "| slimgpt-20+lora | slimgpt | 0.2 | lora |" in run.data.tags["mlflow.note.content"]
    assert run.info.start_time == int(home.results.runs()[0].started_at.timestamp() * 1000)
    assert run.data.tags["slimline.run_key"] == result.run_key
    assert run.data.tags["version.torch"]
    assert {stage.key for stage in result.stages} <= set(run.data.tags.values())
    assert home.results.runs()[0].prefect_run_id in run.data.tags.values()


def test_mlflow_has_a_run_of_every_checkpoint_with_the_same_columns(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    runs = checkpoint_runs(home, result)
    assert set(runs) == set(CHECKPOINTS)
    shared = {"perplexity/wikipedia/ppl_64", "zero_shot/piqa/acc", "size/num_parameters"}
    shared |= {"profile/decode_ms_per_token_p50"}
    figures = {(row.checkpoint, row.metric): row.value for row in result.metrics}
    for name, run in runs.items():
        assert shared <= set(run.data.metrics)
        assert run.data.metrics["size/num_parameters"] == figures[name, "num_parameters"]
        assert run.info.status == "FINISHED"
        assert 0 < run.info.end_time - run.info.start_time < 3_600_000
        contexts = {tag.value for each in run.inputs.dataset_inputs for tag in each.tags}
        assert "evaluation" in ", ".join(contexts)
        assert ("calibration" in ", ".join(contexts)) == (name != "dense")
        assert run.data.tags["mlflow.source.name"] == "slimline"
    assert runs["slimgpt-20+lora"].data.params == {
        "model": "slimline/tiny-random-llama",
        "method": "slimgpt",
        "sparsity": "0.2",
        "split": "default",
        "recovery": "lora",
        "calibration": runs["slimgpt-20"].data.params["calibration"],
    }
    assert (runs["dense"].data.params["method"], runs["dense"].data.params["sparsity"]) == ("none", "0")


def test_mlflow_has_curves_and_files(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    logged = points(home, result)
    curves = {key: [step for step, _ in values] for key, values in logged.items() if len(values) > 1}
    (loss,) = [steps for key, steps in curves.items() if key.endswith("train_loss")]
    assert loss == [1, 2, 3, 4]
    errors = [steps for key, steps in curves.items() if key.endswith("_error")]
    assert errors == [[0, 1, 2, 3], [0, 1, 2, 3]]
    ppl = [key for key in logged if "wikipedia" in key]
    assert len(ppl) == len(CHECKPOINTS)
    client, runs = mlflow_client(home), checkpoint_runs(home, result)

    def files(run_id: str, folder: str | None = None) -> set[str]:
        found = client.list_artifacts(run_id, folder)
        return {path for entry in found for path in (files(run_id, entry.path) if entry.is_dir else [entry.path])}

    assert files(mlflow_run_id(home, result)) == {"spec.json", "stages.json", "paired.json"}
    names = {name: files(run.info.run_id) for name, run in runs.items()}
    assert {"plan.json", "pruning.json", "steps.json", "figures/kept.png"} <= names["slimgpt-20"]
    trained = {"plan.json", "recovery.json", "reports/zero_shot.json", "figures/kept.png", "figures/training.png"}
    assert trained <= names["slimgpt-20+lora"]
    assert "reports/zero_shot.json" in names["dense"]
    assert not [name for each in names.values() for name in each if name.endswith(".safetensors")]


def test_every_checkpoint_is_paired_with_the_dense_one(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    pairs = home.results.pairs(result.run_key)
    figures = {(row.checkpoint, row.task, row.metric): row.value for row in result.metrics}
    assert {row.checkpoint for row in pairs} == set(CHECKPOINTS) - {"dense"}
    assert {row.metric for row in pairs} == {"ppl@64", "acc", "acc_norm"}
    for row in pairs:
        assert row.value == figures[row.checkpoint, row.task, row.metric]
        assert row.reference_value == figures["dense", row.task, row.metric]
        assert row.low <= row.difference <= row.high


def test_curves_were_in_mlflow_while_the_stage_ran(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    client, run_id = mlflow_client(home), mlflow_run_id(home, result)
    runs = checkpoint_runs(home, result)
    loss = client.get_metric_history(runs["slimgpt-20+lora"].info.run_id, "training/train_loss")
    (figure,) = client.get_metric_history(runs["dense"].info.run_id, "perplexity/wikipedia/ppl_64")
    seconds = sum(stage.seconds or 0.0 for stage in result.stages if stage.name.startswith("evaluate"))
    assert (figure.timestamp - max(point.timestamp for point in loss)) / 1000 > seconds / 2
    assert client.get_run(run_id).info.start_time < figure.timestamp - 500 * seconds


def test_who_makes_a_checkpoint_knows_where_its_curves_are_shown(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[InRun | None] = []
    note = "tasks.execution.stage.live_curves"
    monkeypatch.setattr(note, lambda settings, in_run, turn: told.append(in_run) or nullcontext(lambda *_: None))
    result = home.run("smoke", ["steps=[{method: magnitude, sparsity: 0.2, name: small}]", "evals=[]", *QUICK])
    assert list(statuses(result)) == ["import-model", "calibrate", "order:dense", "prune:small"]
    assert told == [None, None, None, InRun(result.run_key, "smoke", "small")]


def test_checkpoints_are_registered_by_reference(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    versions = mlflow_client(home).search_model_versions()
    sources = {version.source.removeprefix("file://") for version in versions}
    assert result.checkpoint in sources
    for alias in ("last-good", "best-20pct"):
        version = mlflow_client(home).get_model_version_by_alias("smoke", alias)
        assert Path(version.source.removeprefix("file://")).parent.name == "checkpoint"
    assert mlflow_client(home).get_model_version_by_alias("smoke", "last-good").description == CHECKPOINTS[-1]


def test_prefect_shows_every_stage_and_a_table(smoke: tuple[Home, RunResult]) -> None:
    home, result = smoke
    assert prefect_states(home, result) == dict.fromkeys([*STAGES, "record"], "Completed")
    with get_client(sync_client=True) as client:
        shown = client.read_artifacts(flow_run_filter=only_run_of(home, result))
    (table,) = [artifact for artifact in shown if artifact.key == "slimline-results"]
    assert all(name in str(table.data) for name in CHECKPOINTS)
    (page,) = [artifact for artifact in shown if artifact.key == "slimline-run-smoke"]
    row = home.results.runs()[0]
    assert all(f"| {name} |" in str(page.data) for name in CHECKPOINTS)
    assert f"[MLflow run](http://127.0.0.1:5000/#/runs/{row.mlflow_run_id})" in str(page.data)
    assert f"`{result.checkpoint}`" in str(page.data)
    assert str(page.data).count("](data:image/png;base64,") == 2, "what is kept in both, and one training"
    progress = [artifact for artifact in shown if artifact.type == "progress"]
    assert len(progress) == len(STAGES)
    assert {float(artifact.data) for artifact in progress} == {100.0}


def test_the_second_run_runs_nothing_but_record(smoke_copy: Home, filled: list[str]) -> None:
    before = (smoke_copy.results.metrics(), smoke_copy.results.layers(smoke_copy.results.runs()[0].run_key))
    result = smoke_copy.run("smoke")
    assert filled == []
    assert not model_cache._cache, "models leave memory when a run ends"
    assert set(statuses(result).values()) == {"cached"}
    assert all(stage.seconds for stage in result.stages)
    assert prefect_states(smoke_copy, result) == {"record": "Completed"}
    assert len(smoke_copy.results.runs()) == 1
    assert (smoke_copy.results.metrics(), smoke_copy.results.layers(result.run_key)) == before
    assert len(smoke_copy.results.stages(result.run_key)) == len(STAGES)


def test_figures_keep_the_versions_of_their_time(smoke_copy: Home, smoke: tuple[Home, RunResult]) -> None:
    stage = next(stage for stage in smoke[1].stages if stage.name == "evaluate:zero_shot:dense")
    manifest = smoke_copy.store.path(ArtifactRef(kind="report", key=stage.key)) / MANIFEST
    written = json.loads(manifest.read_bytes())
    assert written["versions"]["torch"] == versions()["torch"]
    manifest.write_text(json.dumps(written | {"versions": {"torch": "1.0", "prefect": "2.0"}}))
    result = smoke_copy.run("smoke")
    found = {(row.suite, row.checkpoint): json.loads(row.protocol) for row in result.metrics}
    assert found["zero_shot", "dense"]["versions"] == {"torch": "1.0"}
    assert found["perplexity", "dense"]["versions"]["torch"] == versions()["torch"]
    (identity,) = found["zero_shot", "dense"]["data_identity"]
    assert identity.keys() == {"repo_id", "content"}
    tags = mlflow_client(smoke_copy).get_run(mlflow_run_id(smoke_copy, result)).data.tags
    assert set(tags["version.torch"].split(", ")) == {"1.0", versions()["torch"]}


def test_a_second_run_adds_no_point_to_mlflow(home: Home) -> None:
    only_training = ["steps=[{recovery: lora, max_steps: 2, batch_size: 4, num_examples: 32, dtype: float32}]",
        "steps.0.data.dataset=slimline/instructions", "evals=[]", *QUICK]  # fmt: skip
    first = home.run("smoke", only_training)
    before = points(home, first)
    second = home.run("smoke", [*only_training, "description=other words"])
    assert second.run_key == first.run_key
    assert set(statuses(second).values()) == {"cached"}
    assert points(home, second) == before
    (loss,) = [history for key, history in before.items() if key.endswith("train_loss")]
    assert [step for step, _ in loss] == [1, 2]
    client = mlflow_client(home)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1 + len(first.checkpoints) + 1, "of the run, the dense model and what was trained"


def test_no_stage_waits_for_a_concurrency_limit(smoke: tuple[Home, RunResult]) -> None:
    """Prefect asks its server for a limit on every tag of a task, which took ten seconds of a fully cached run."""
    assert [task.name for task in prefect_tasks(*smoke) if task.tags] == []


def test_changing_one_eval_runs_that_eval(smoke_copy: Home, filled: list[str]) -> None:
    result = smoke_copy.run("smoke", ["evals.1.limit=5"])
    asked = {f"evaluate:zero_shot:{name}" for name in CHECKPOINTS}
    assert set(filled) == asked
    assert not_cached(result) == asked
    assert {row.num_examples for row in result.metrics if row.suite == "zero_shot"} == {5}
    assert len(smoke_copy.results.runs()) == 2


def test_changing_the_training_runs_what_follows_from_it(smoke_copy: Home, filled: list[str]) -> None:
    result = smoke_copy.run("smoke", ["steps.1.learning_rate=0.01", *QUICK])
    assert not_cached(result) == {stage for stage in STAGES if "+lora" in stage and "profile" not in stage}
    assert sorted(filled) == sorted(not_cached(result))


def test_refresh_runs_a_stage_and_what_follows(smoke_copy: Home, filled: list[str]) -> None:
    result = smoke_copy.run("smoke", QUICK, refresh=("recover",))
    assert set(filled) == {stage for stage in STAGES if "+lora" in stage and "profile" not in stage}
    assert not_cached(result) == set(filled)
    filled.clear()
    assert not_cached(smoke_copy.run("smoke", QUICK)) == set()
    assert filled == []


def test_refresh_of_an_unknown_stage_names_the_nearest(smoke_copy: Home, filled: list[str]) -> None:
    with pytest.raises(SpecError, match="--refresh: unknown stage 'calibrat'; did you mean 'calibrate'"):
        smoke_copy.run("smoke", refresh=("calibrat",))
    assert filled == []


def test_a_deleted_artifact_is_made_again(
    smoke_copy: Home, smoke: tuple[Home, RunResult], filled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (pruned,) = [stage for stage in smoke[1].stages if stage.name == "prune:slimgpt-20"]
    folder = smoke_copy.store.root / "checkpoint" / pruned.key
    before = weights(folder)
    shutil.rmtree(folder)
    result = smoke_copy.run("smoke", QUICK)
    assert filled == ["prune:slimgpt-20"]
    assert not_cached(result) == {"prune:slimgpt-20"}
    after = weights(folder)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    warnings = [
        record.message for record in caplog.records if pruned.key in record.message and record.levelname == "WARNING"
    ]
    assert len(warnings) == 1


def test_a_truncated_artifact_is_made_again(smoke_copy: Home, smoke: tuple[Home, RunResult], filled: list[str]) -> None:
    (dense,) = [stage for stage in smoke[1].stages if stage.name == "evaluate:zero_shot:dense"]
    report = smoke_copy.store.root / "report" / dense.key / "report.json"
    report.write_text(report.read_text(encoding="utf-8")[:-5], encoding="utf-8")
    assert not_cached(smoke_copy.run("smoke", QUICK)) == {"evaluate:zero_shot:dense"}
    assert filled == ["evaluate:zero_shot:dense"]


def test_a_store_without_prefect_records_is_still_a_hit(smoke_copy: Home, filled: list[str]) -> None:
    shutil.rmtree(smoke_copy.folder / "prefect-results")
    assert not_cached(smoke_copy.run("smoke", QUICK)) == set()
    assert filled == []


def test_two_sparsities_share_one_capture(smoke_copy: Home, filled: list[str]) -> None:
    one = ["steps=[{method: slimgpt, propagate_error: false, sparsity: 0.2}]", "evals=[]", *QUICK]
    smoke_copy.run("smoke", one)
    result = smoke_copy.run("smoke", [*one, "steps.0.sparsity=0.4"])
    assert filled == ["capture:dense", "order:dense", "prune:slimgpt-20", "prune:slimgpt-40"]
    assert statuses(result)["capture:dense"] == statuses(result)["order:dense"] == "cached"


def test_a_step_on_a_pruned_checkpoint(smoke_copy: Home) -> None:
    """Plans compose: pruned twice, the result is smaller than once, and is measured and recorded as such."""
    steps = "steps=[{method: slimgpt, sparsity: 0.2}, {method: slimgpt, sparsity: 0.3, name: twice}]"
    result = smoke_copy.run("smoke", [steps, "evals.0.on=twice", "evals.1.on=twice", *QUICK])
    assert not_cached(result) == {"prune:twice", "evaluate:perplexity:twice", "evaluate:zero_shot:twice"}
    folders = [
        smoke_copy.store.root / "checkpoint" / stage.key for stage in result.stages if stage.kind == "checkpoint"
    ]
    sizes = [sum(tensor.numel() for tensor in weights(folder).values()) for folder in folders]
    assert sizes[0] > sizes[1] > sizes[2]


def mirror_of(offline_root: Path, folder: Path) -> Path:
    """The part of the offline default that the smoke spec reads, as a mirror of one's own."""
    names = ("tiny-random-llama", "news", "wikipedia", "instructions")
    for repo_id in [*(f"slimline/{name}" for name in names), "baber/piqa"]:
        shutil.copytree(offline_root / repo_id, folder / repo_id)
    return folder


def spoil(folder: Path, home: Home) -> dict[Path, bytes]:
    """Overwrite the data files as a failing disk does: nobody is told, so the memo of hashes has the good files' still,
    and the keys are those of the good files. Returns what was in them."""
    good = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    assert good
    memo = home.folder / "cache/fingerprints.json"
    known = json.loads(memo.read_bytes()) if memo.exists() else {}
    for path, content in good.items():
        path.write_bytes(b"x" * len(content))
        known[str(path)] = [stamp(path.stat()), sha256(content).hexdigest()]
    memo.parent.mkdir(exist_ok=True)
    memo.write_text(json.dumps(known), encoding="utf-8")
    return good


def broken_off(*arguments: object, **options: object) -> None:
    raise RuntimeError("the device was lost")


def test_what_failed_is_run_again_alone(
    smoke: tuple[Home, RunResult], home: Home, offline_root: Path, tmp_path: Path, filled: list[str]
) -> None:
    mirror = mirror_of(offline_root, tmp_path / "mirror")
    spec = [f"mirror={mirror}", *QUICK]
    good = spoil(mirror / "slimline/wikipedia", home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.recovery.lora.recover", broken_off)
        with pytest.raises(StagesFailed) as caught:
            home.run("smoke", spec)
    result = caught.value.result
    perplexities = {f"evaluate:perplexity:{name}" for name in CHECKPOINTS[:2]}
    assert {stage.name for stage in result.failures} == perplexities | {"recover:slimgpt-20+lora"}
    skipped = {f"evaluate:{suite}:slimgpt-20+lora" for suite in ("perplexity", "zero_shot")}
    assert {name for name, status in statuses(result).items() if status == "skipped"} == skipped
    assert result.checkpoint is None
    for name in {stage.name for stage in result.failures}:
        assert name in str(caught.value)
    assert {(row.checkpoint, row.suite) for row in result.metrics} == {(name, "zero_shot") for name in CHECKPOINTS[:2]}
    (run,) = home.results.runs()
    assert run.status == "failed"
    assert run.message
    assert "recover:slimgpt-20+lora" in run.message
    assert {row.name: row.status for row in home.results.stages(run.run_key)} == statuses(result)
    assert mlflow_client(home).get_run(mlflow_run_id(home, result)).info.status == "FAILED"

    for path, content in good.items():
        path.write_bytes(content)
    filled.clear()
    healed = home.run("smoke", spec)
    assert healed.run_key == result.run_key
    assert set(filled) == perplexities | {"recover:slimgpt-20+lora"} | skipped | {"evaluate:perplexity:slimgpt-20+lora"}
    assert not_cached(healed) == set(filled)
    assert home.results.runs()[0].status == "completed"
    assert mlflow_client(home).get_run(mlflow_run_id(home, healed)).info.status == "FINISHED"
    same = {(row.checkpoint, row.metric): row.value for row in smoke[1].metrics if row.suite != "profile"}
    assert {(row.checkpoint, row.metric): row.value for row in healed.metrics} == same


def test_a_window_longer_than_the_context_is_refused_before_any_work(smoke_copy: Home, filled: list[str]) -> None:
    with pytest.raises(EvaluationError, match="a window of 100000 tokens is longer than the model's"):
        smoke_copy.run("smoke", ["evals.0.windows=[100000]", *QUICK])
    assert filled == []
