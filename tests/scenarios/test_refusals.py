"""What only a running stage can find out: one sentence, the user's to mend, and what was finished stays."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from flows.errors import SpecError
from flows.run.outcome import RunResult, StagesFailed
from flows.spec.load import load_spec
from infra.errors import DiskFull, SourceInvalid
from pruning.errors import PruningError
from tests.flows.home import Home
from tests.flows.models import of_type, overflowing, with_nan

ONLY_PRUNE = ("evals=[]", "profile=null", "steps=[{method: slimgpt, sparsity: 0.2}]")


def failed(home: Home, *overrides: str) -> tuple[str, RunResult]:
    """The message of a run that fails for a reason that the user can mend, and what became of its stages."""
    with pytest.raises(StagesFailed) as caught:
        home.run("smoke", [*ONLY_PRUNE, *overrides])
    assert caught.value.by_user, caught.value
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.result


def test_too_few_tokens(smoke_copy: Home) -> None:
    message, result = failed(smoke_copy, "calibration.num_samples=100000")
    assert message.startswith("calibrate: the calibration text of slimline/news has ")
    assert "100000" in message
    assert "lower num_samples or seq_len" in message
    assert [stage.status for stage in result.stages] == ["cached", "failed", "skipped"]


def test_files_of_a_model_are_named_where_they_are_not_where_they_were_copied_to(
    smoke_copy: Home, offline_root: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(offline_root / "slimline/tiny-random-llama", tmp_path / "model"))
    (model / "tokenizer.json").write_text("{broken", encoding="utf-8")
    message, _ = failed(smoke_copy, f"model.id={model}")
    assert message.startswith(f"import-model: {model} has no tokenizer that loads and works (")
    assert str(smoke_copy.folder) not in message


def test_weights_that_are_not_numbers(smoke_copy: Home, offline_root: Path, tmp_path: Path) -> None:
    model = with_nan(offline_root / "slimline/tiny-random-llama", tmp_path / "model")
    message, result = failed(smoke_copy, f"model.id={model}")
    assert "model.layers.2.mlp.down_proj.weight" in message
    assert [stage.status for stage in result.stages] == ["failed", "skipped", "skipped"]
    again, _ = failed(smoke_copy, f"model.id={model}")
    assert again == message


@pytest.mark.parametrize("propagate_error", ["true", "false"])
def test_hessians_that_are_not_numbers(
    propagate_error: str, smoke_copy: Home, offline_root: Path, tmp_path: Path
) -> None:
    """Every weight is finite, so it is imported, but what the model computes overflows."""
    model = overflowing(offline_root / "slimline/tiny-random-llama", tmp_path / "model")
    message, result = failed(smoke_copy, f"model.id={model}", f"steps.0.propagate_error={propagate_error}")
    assert "layers.1" in message
    assert "finite" in message
    assert {stage.name: stage.status for stage in result.stages}["calibrate"] == "completed"
    assert result.checkpoint is None


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{method: slimgpt, sparsity: 0.999}", "sparsity 0.999 cannot be reached"),
        ("{method: llm_pruner, sparsity: 0.3, protect_first: 3}", "sparsity 0.3 cannot be reached"),
        ("{method: flap, sparsity: 0.2, protect_first: 9}", "at most 0.000 of the decoder-layer"),
        ("{method: shortened, layers: 9}", "layers 9: of this model's"),
        ("{method: shortened, sparsity: 0.01}", "is less than half of the smallest of the layers"),
    ],
)
def test_what_cannot_be_pruned_is_known_before_any_work(step: str, words: str, smoke_copy: Home) -> None:
    with pytest.raises(PruningError, match=re.escape(words)):
        smoke_copy.run("smoke", ["evals=[]", "profile=null", "calibration.seed=5", f"steps=[{step}]"])
    assert len(list((smoke_copy.store.root / "calibration").iterdir())) == 1  # that of the run before


@pytest.mark.parametrize(
    ("family", "steps", "words"),
    [
        (("gemma2", "Gemma2ForCausalLM"), "{method: shortened, layers: 1, merge: linear}", "set merge to none"),
        (
            ("phi3", "Phi3ForCausalLM"),
            "{method: slimgpt, sparsity: 0.2},"
            " {recovery: lora, targets: [q, v], data: {dataset: slimline/instructions}}",
            "the targets q, v are parts of one linear in a phi3 model (qkv_proj: q, k, v)",
        ),
        (
            ("olmo2", "Olmo2ForCausalLM"),
            "{method: compresso, sparsity: 0.2, data: {dataset: slimline/instructions, template: alpaca}}",
            "in an olmo2 model one norm spans the queries of all heads",
        ),
    ],
)
def test_what_a_family_cannot_take_is_known_before_any_work(
    family: tuple[str, str], steps: str, words: str, smoke_copy: Home, offline_root: Path, tmp_path: Path
) -> None:
    model = of_type(offline_root / "slimline/tiny-random-llama", tmp_path / "model", *family)
    with pytest.raises(PruningError, match=re.escape(words)):
        smoke_copy.run("smoke", ["evals=[]", "profile=null", f"model.id={model}", f"steps=[{steps}]"])
    assert len(list((smoke_copy.store.root / "calibration").iterdir())) == 1  # that of the run before


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{method: flap, sparsity: 0.2, criterion: ppl}", "unknown key 'criterion'"),
        ("{method: shortened, sparsity: 0.2, layers: 2}", "give either sparsity or layers"),
        ("{method: shortened}", "give either sparsity or layers"),
        ("{method: shortened, layers: 1, unit: sub_layer, merge: linear}", "merge 'linear' stands in for whole layers"),
        ("{method: wanda_sp, sparsity: 0.2, repair: bias}", "repair"),
        ("{method: flap, sparsity: 0.2, structure: AL-MM}", "structure AL-MM shares the cut as split says; give split"),
        ("{method: flap, sparsity: 0.2, split: ffn}", "structure AL-AM shares the cut by itself; leave split out"),
    ],
)
def test_options_of_another_method_are_refused(step: str, words: str) -> None:
    with pytest.raises(SpecError, match=re.escape(words)):
        load_spec("smoke", [f"steps=[{step}]"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("calibration.data.text_field=body",), ("slimline/news has no column 'body'", "it has text")),
        (("calibration.data.template=alpaca",), ("slimline/news has no column 'instruction'", "it has text")),
        (("calibration.data.split=training",), ("'training'", "did you mean 'train'?")),
    ],
)
def test_calibration_data_that_cannot_be_read_is_known_before_any_work(
    overrides: tuple[str, ...], words: tuple[str, str], home: Home, filled: list[str]
) -> None:
    with pytest.raises(SourceInvalid) as caught:
        home.run("smoke", [*ONLY_PRUNE, *overrides])
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)
    assert filled == []
    assert not home.settings.results_path.exists()


def test_training_records_that_cannot_be_read_are_known_before_any_pruning(
    home: Home, filled: list[str], tmp_path: Path
) -> None:
    lora = "steps=[{{method: slimgpt, sparsity: 0.2}}, {{recovery: lora, data: {}}}]"
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": ', encoding="utf-8")
    for data, sentence in (
        ("{dataset: slimline/instructions, output: answers}", "slimline/instructions has no column 'answers'"),
        (f"{{dataset: {broken}}}", f"{broken} cannot be read: line 2 is no JSON"),
    ):
        with pytest.raises(SourceInvalid, match=sentence):
            home.run("smoke", ["evals=[]", "profile=null", lora.format(data)])
    assert filled == []


def test_what_knows_no_pieces_is_refused_before_any_pruning(
    home: Home, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIMLINE_TRAIN_PROCESSES", "2")
    monkeypatch.setenv("SLIMLINE_TRAIN_SHARDED", "true")
    cpt = "{recovery: cpt, data: {dataset: slimline/news}, num_tokens: 64, seq_len: 32, optimizer: adafactor}"
    with pytest.raises(PruningError, match="optimizer adafactor knows whole weights only"):
        home.run("smoke", ["evals=[]", "profile=null", f"steps=[{{method: slimgpt, sparsity: 0.2}}, {cpt}]"])
    assert filled == []


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            "{method: loraprune, sparsity: 0.2, data: {dataset: slimline/news, text_field: body}}",
            "has no column 'body'",
        ),
        (
            "{method: compresso, sparsity: 0.2, data: {dataset: slimline/instructions, output: answers}}",
            "slimline/instructions has no column 'answers'",
        ),
        ("{method: loraprune, sparsity: 0.99, data: {dataset: slimline/news}, seq_len: 32}", "0.99 cannot be reached"),
        (
            "{method: loraprune, sparsity: 0.2, data: {dataset: slimline/news}, seq_len: 100000}",
            "seq_len 100000 is longer than the model's context",
        ),
    ],
)
def test_a_pruning_that_trains_is_checked_before_any_work(
    step: str, sentence: str, home: Home, filled: list[str]
) -> None:
    with pytest.raises((SourceInvalid, PruningError), match=sentence):
        home.run("smoke", [f"steps=[{step}]", "calibration=null", "evals=[]", "profile=null"])
    assert filled == []


def test_a_tokenizer_that_loads_and_does_not_work(smoke_copy: Home, offline_root: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(offline_root / "slimline/tiny-random-llama", model)
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": "long"}), encoding="utf-8")
    message, result = failed(smoke_copy, f"model.id={model}")
    assert message.startswith(f"import-model: {model} has no tokenizer that loads and works (")
    assert [stage.status for stage in result.stages] == ["failed", "skipped", "skipped"]


def test_results_that_cannot_be_written_leave_the_stages_done(
    smoke_copy: Home, filled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures could not be recorded; nothing of the work is lost. If it is known before, nothing is begun."""
    from infra.errors import ResultsUnusable
    from tasks.execution import stage

    results, good = smoke_copy.results.files.folder, smoke_copy.results.files.folder.with_name("good")
    make = stage._make

    def overtaken(request: object, stage_name: str, *rest: object) -> float:
        results.rename(good)
        results.write_text("no folder")
        return make(request, stage_name, *rest)

    monkeypatch.setattr(stage, "_make", overtaken)
    with pytest.raises(ResultsUnusable):
        smoke_copy.run("smoke", [*ONLY_PRUNE, "steps.0.sparsity=0.3"])
    monkeypatch.setattr(stage, "_make", make)
    with pytest.raises(ResultsUnusable, match="set SLIMLINE_RESULTS_DB or SLIMLINE_RESULTS_FOLDER to another place"):
        smoke_copy.run("smoke", [*ONLY_PRUNE, "steps.0.sparsity=0.4"])
    assert filled == ["prune:slimgpt-30"]
    results.unlink()
    good.rename(results)
    smoke_copy.run("smoke", [*ONLY_PRUNE, "steps.0.sparsity=0.3"])
    assert filled == ["prune:slimgpt-30"]


def test_a_full_disk(
    smoke_copy: Home, small_disk: Path, tmp_path: Path, blank_mlflow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the store is on the small disk: databases and caches have room, as they would on a cluster."""
    from tasks.execution import stage

    home = Home.create(small_disk / "home", smoke_copy.folder / "offline", smoke_copy.api_url)
    shutil.copyfile(blank_mlflow, tmp_path / "mlflow.db")
    home.variables.update(
        SLIMLINE_MLFLOW_URI=f"sqlite:///{tmp_path / 'mlflow.db'}",
        SLIMLINE_RESULTS_DB=str(tmp_path / "results.duckdb"),
    )
    nothing_else = ["evals=[]", "profile=null"]
    home.run("smoke", ["steps=[]", "calibration=null", *nothing_else])
    spec = ["steps=[{method: slimgpt, sparsity: 0.2, split: equal}]", "calibration.num_samples=40", *nothing_else]

    def fill_up(leave: int) -> None:
        free = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_bsize - leave))

    fill_up(1_550_000)
    # the pruned checkpoint would fit, but its layers come with a residual stream
    with pytest.raises(DiskFull, match=r"2 stages .* while it works.* MiB free; make room with `slimline gc --delete`"):
        home.run("smoke", spec)
    (small_disk / "ballast").unlink()
    make = stage._make

    def overtaken(request: object, stage_name: str, *rest: object) -> float:
        if stage_name.startswith("prune"):
            fill_up(1_550_000)  # somebody else, after we looked
        return make(request, stage_name, *rest)

    monkeypatch.setattr(stage, "_make", overtaken)
    message, _ = failed(home, *spec)
    assert message.startswith("prune:slimgpt-20: ")
    assert str(small_disk) in message
    assert "full" in message or "space" in message
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(stage, "_make", make)
    again = home.run("smoke", spec)
    assert {stage.name: stage.status for stage in again.stages} == {
        "import-model": "cached",
        "calibrate": "cached",
        "prune:slimgpt-20": "completed",
    }
