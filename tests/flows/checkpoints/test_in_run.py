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


def test_a_family_without_gguf_is_refused_before_any_work(home: Home, tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    tiny_model("phi").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(PruningError, match="exports: GGUF files of the family phi are not written"):
        home.run("smoke", [*EXPORT, f"model.id={folder}"])
