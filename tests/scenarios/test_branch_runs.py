"""Branches really run on the tiny model: what they share, what becomes of the others when one fails, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.run.outcome import RunResult, StagesFailed
from tests.flows.home import Home
from tests.flows.run.test_compress import (
    checkpoint_runs,
    mlflow_client,
    mlflow_run_id,
    not_cached,
    points,
    statuses,
    weights,
)

ONLY_PRUNE = ("evals=[]", "profile=null")
LORA = "{recovery: lora, data: {dataset: slimline/instructions}, num_examples: 16, max_steps: 1, batch_size: 4, "
ONE_IMPOSSIBLE = (
    f"steps=[{{method: slimgpt, sparsity: [0.2, 0.999, 0.5]}}, {LORA} max_length: 128, dtype: float32}}]",
    "evals=[{suite: perplexity, dataset: slimline/wikipedia, config: null, windows: [64], max_windows: 8}]",
    "profile=null",
)


def size(folder: str | None) -> int:
    """Number of elements of a checkpoint."""
    assert folder is not None
    return sum(tensor.numel() for tensor in weights(Path(folder)).values())


def test_four_sparsities_are_one_capture(smoke_copy: Home, filled: list[str]) -> None:
    step = "steps=[{method: slimgpt, propagate_error: false, sparsity: [0.2, 0.25, 0.33, 0.5]}]"
    result = smoke_copy.run("smoke", [step, *ONLY_PRUNE])
    prunes = {f"prune:slimgpt-{percent}" for percent in (20, 25, 33, 50)}
    assert sorted(filled) == ["capture:dense", "order:dense", *sorted(prunes)]
    assert not_cached(result) == set(filled)
    assert list(result.checkpoints) == ["slimgpt-20", "slimgpt-25", "slimgpt-33", "slimgpt-50"]
    sizes = [size(folder) for folder in result.checkpoints.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_variants_are_pruned_as_they_say(smoke_copy: Home) -> None:
    variants = "{ffn: {split: ffn}, attention: {split: attention}, few: {split: ffn, calibration: {num_samples: 4}}}"
    step = f"steps=[{{method: slimgpt, sparsity: 0.2, variants: {variants}}}]"
    result = smoke_copy.run("smoke", [step, *ONLY_PRUNE])
    assert not_cached(result) == {"prune:ffn", "prune:attention", "prune:few", "calibrate:few"}
    kept = {}
    for name, folder in result.checkpoints.items():
        layers = json.loads((Path(str(folder)) / "pruning.json").read_text(encoding="utf-8"))["layers"]
        kept[name] = {
            half: sum(row["kept"] for row in layers if row["sub_layer"] == half) for half in ("attention", "mlp")
        }
        pruned = [row for row in layers if row["kept"] < row["total"]]
        assert {row["num_tokens"] for row in pruned} == {(4 if name == "few" else 8) * 64}
    assert kept["ffn"]["attention"] > kept["attention"]["attention"]
    assert kept["ffn"]["mlp"] < kept["attention"]["mlp"]
    assert kept["few"] == kept["ffn"]


def failed(home: Home) -> StagesFailed:
    with pytest.raises(StagesFailed) as caught:
        home.run("smoke", ONE_IMPOSSIBLE)
    return caught.value


def test_an_impossible_branch_leaves_the_others_alone(smoke_copy: Home, filled: list[str]) -> None:
    error = failed(smoke_copy)
    assert error.by_user
    assert str(error).startswith("prune:slimgpt-99.9: ")
    assert "prune:slimgpt-50" not in str(error)
    result: RunResult = error.result
    told = statuses(result)
    after = {"recover:slimgpt-99.9+lora", "evaluate:perplexity:slimgpt-99.9", "evaluate:perplexity:slimgpt-99.9+lora"}
    assert {name for name, status in told.items() if status == "failed"} == {"prune:slimgpt-99.9"}
    assert {name for name, status in told.items() if status == "skipped"} == after
    good = ("slimgpt-20", "slimgpt-20+lora", "slimgpt-50", "slimgpt-50+lora")
    assert [row.checkpoint for row in result.metrics] == ["dense", *good]
    made = {name: folder is not None for name, folder in result.checkpoints.items()}
    assert made == {"slimgpt-20+lora": True, "slimgpt-99.9+lora": False, "slimgpt-50+lora": True}

    (run,) = [row for row in smoke_copy.results.runs() if row.run_key == result.run_key]
    assert run.status == "failed"
    assert run.message is not None
    assert run.message.startswith("prune:slimgpt-99.9: ")
    assert [row.name for row in smoke_copy.results.stages(run.run_key) if row.status == "skipped"] == [
        name for name in told if name in after
    ]
    keys = {stage.name: stage.key for stage in result.stages}
    layers = smoke_copy.results.layers(run.run_key)
    assert {row.stage_key for row in layers} == {keys["prune:slimgpt-20"], keys["prune:slimgpt-50"]}
    mlflow_run = mlflow_client(smoke_copy).get_run(mlflow_run_id(smoke_copy, result))
    assert mlflow_run.info.status == "FAILED"
    assert set(checkpoint_runs(smoke_copy, result)) == {"dense", *good}
    assert mlflow_run.data.params == {}, "first values are kept, and not all checkpoints are there"

    filled.clear()
    healed = smoke_copy.run("smoke", [*ONE_IMPOSSIBLE, "steps.0.sparsity=[0.2, 0.5]"])
    assert filled == []
    assert healed.metrics
    assert {row.value for row in healed.metrics} == {row.value for row in result.metrics}


@pytest.mark.long
def test_the_command_says_which_branch_failed(smoke_copy: Home) -> None:
    options = [part for override in ONE_IMPOSSIBLE for part in ("--set", override)]
    child = smoke_copy.slimline("run", "smoke", *options, "--json", code=2)
    assert child.stderr.strip().splitlines()[-1].startswith("slimline: prune:slimgpt-99.9: ")
    lines = child.stdout.splitlines()
    assert lines[0].split() == ["dense", "slimgpt-20", "slimgpt-20+lora", "slimgpt-50", "slimgpt-50+lora"]
    assert "checkpoint slimgpt-99.9+lora: not made" in lines
    told = json.loads(lines[-1])
    assert told["checkpoints"]["slimgpt-99.9+lora"] is None
    assert (Path(told["checkpoints"]["slimgpt-20+lora"]) / "model.safetensors").exists()
    results = smoke_copy.slimline("results", "--format", "table").stdout.splitlines()
    assert ", failed, " in results[0]
    assert results[-1].startswith("failed: prune:slimgpt-99.9: ")


def test_one_checkpoint_under_two_names_is_measured_once_and_told_twice(smoke_copy: Home, filled: list[str]) -> None:
    steps = "steps=[{method: slimgpt, sparsity: 0.2, variants: {full: , paper: {curve: log_increase}}}]"
    result = smoke_copy.run("smoke", [steps, "profile=null"])
    assert filled == []  # it is what the smoke spec prunes
    values = {(row.checkpoint, row.metric): row.value for row in result.metrics}
    assert values["full", "ppl@64"] == values["paper", "ppl@64"] != values["dense", "ppl@64"]
    assert len(smoke_copy.results.layers(result.run_key)) == 4 * 2
    logged = points(smoke_copy, result)
    assert logged["full/layers/mlp_error"] == logged["paper/layers/mlp_error"]
    assert len(logged["full/layers/mlp_error"]) == 4
