"""An export in a spec: a stage like any other, and the file that it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.run.outcome import RunResult
from infra.artifacts.store import ArtifactRef
from infra.models.gguf_header import read_gguf_header
from pruning.errors import PruningError
from tests.flows.home import Home
from tests.tiny import tiny_model, tiny_tokenizer

EXPORT = ("name=files", "evals=[]", "profile=null", "exports=[{format: gguf, type: q8_0}]")


def test_a_run_leaves_a_file_for_llama_cpp(smoke_copy: Home, smoke: tuple[Home, RunResult], filled: list[str]) -> None:
    result = smoke_copy.run("smoke", EXPORT)
    assert filled == ["export:gguf-q8_0:slimgpt-20+lora"]
    (stage,) = [stage for stage in result.stages if stage.kind == "export"]
    folder = smoke_copy.store.path(ArtifactRef(kind="export", key=stage.key))
    values = read_gguf_header(folder / "model.gguf").values
    assert values["general.file_type"] == 7
    assert (values["slimline.method"], values["slimline.recovery"]) == ("slimgpt", "lora")
    assert values["slimline.sparsity"] == pytest.approx(0.2)
    assert {stage.status for stage in smoke_copy.run("smoke", EXPORT).stages} == {"cached"}
    assert filled == ["export:gguf-q8_0:slimgpt-20+lora"]
    assert smoke[1].run_key not in result.run_key
    assert smoke_copy.store.verify(ArtifactRef(kind="export", key=stage.key)) == []


def test_a_run_measures_what_it_exported(smoke_copy: Home, filled: list[str]) -> None:
    asked = ["profile=null", "evals.1.on=[dense]", "exports=[{format: gguf, type: q4_0, measure: {runs: 1}}]"]
    result = smoke_copy.run("smoke", ["name=measured", *asked])
    name = "slimgpt-20+lora+q4_0"
    made = {"export:gguf-q4_0:slimgpt-20+lora", f"evaluate:perplexity:{name}", f"profile:{name}"}
    assert set(filled) == made
    figures = {(row.checkpoint, row.suite, row.task, row.metric): row for row in result.metrics}
    size = figures[name, "profile", "profile", "file_bytes"]
    (file,) = [stage for stage in result.stages if stage.kind == "export"]
    assert size.value == (smoke_copy.store.root / "export" / file.key / "model.gguf").stat().st_size
    assert size.checkpoint_key == file.key
    whole, quantised = (
        next(row for row in result.metrics if row.checkpoint == each and row.metric == "ppl@64")
        for each in ("slimgpt-20+lora", name)
    )
    assert quantised.value == pytest.approx(whole.value, rel=0.1)
    assert quantised.value != whole.value
    assert [row.checkpoint for row in smoke_copy.results.checkpoints(result.run_key)][-1] == "slimgpt-20+lora"
    shown = smoke_copy.slimline("results", "--run", "measured", "--format", "markdown").stdout
    assert "file MiB" in shown
    assert f"| {name} |" in shown
    assert "profile of files: runtime" in shown
    pairs = smoke_copy.results.pairs(result.run_key)
    assert name in {row.checkpoint for row in pairs}
    with smoke_copy.lived_in():
        from mlflow import MlflowClient

        client = MlflowClient(smoke_copy.settings.tracking_uri)
        (experiment,) = [each for each in client.search_experiments() if each.name == "slimline"]
        runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
    assert [run.data.metrics["profile/file_bytes"] for run in runs] == [size.value]
    assert runs[0].data.params["method"] == "slimgpt"


def test_a_family_without_gguf_is_refused_before_any_work(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    tiny_model("phi").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(PruningError, match="exports: GGUF files of the family phi are not written"):
        home.run("smoke", [*EXPORT, f"model.id={folder}"])
