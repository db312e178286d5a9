"""Methods in runs of the tiny model: what they share, how they follow each other, what is recorded of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from infra.artifacts.store import ArtifactRef
from pruning.checkpoints.save_load import load_checkpoint, load_plan
from pruning.modeling import config_shapes
from pruning.plan import PruningPlan
from tests.flows.home import Home
from tests.flows.run.test_compress import checkpoint_runs, not_cached, statuses

ONLY_PRUNE = ("evals=[]", "profile=null")


def plan_of(folder: str | None) -> PruningPlan:
    assert folder is not None
    plan = load_plan(Path(folder))
    assert plan is not None
    return plan


@pytest.mark.parametrize("method", ["flap", "llm_pruner", "shortened"])
def test_two_sparsities_share_one_ranking(method: str, smoke_copy: Home, filled: list[str]) -> None:
    options = ", protect_first: 1, protect_last: 0" if method == "llm_pruner" else ""
    result = smoke_copy.run("smoke", [f"steps=[{{method: {method}, sparsity: [0.25, 0.5]{options}}}]", *ONLY_PRUNE])
    assert sorted(filled) == ["order:dense", f"prune:{method}-25", f"prune:{method}-50"]
    assert list(result.checkpoints) == [f"{method}-25", f"{method}-50"]
    one, other = (plan_of(folder) for folder in result.checkpoints.values())
    assert sum(shape.intermediate_size for shape in one.shapes) > sum(shape.intermediate_size for shape in other.shapes)


def test_depth_then_width_then_a_second_time(smoke_copy: Home, filled: list[str]) -> None:
    steps = "steps=[{method: shortened, layers: 1}, {method: slimgpt, sparsity: 0.2}]"
    result = smoke_copy.run("smoke", [steps, *ONLY_PRUNE])
    assert filled == ["order:dense", "prune:shortened-1-layers", "prune:slimgpt-20"]
    (name,) = result.checkpoints
    plan = plan_of(result.checkpoints[name])
    assert len(plan.dropped_layers) == 1
    assert plan.source[0].intermediate_size > plan.shapes[0].intermediate_size
    (rows,) = [
        [row for row in smoke_copy.results.layers(result.run_key) if row.stage_key == key]
        for key in {stage.key for stage in result.stages if stage.name == "prune:slimgpt-20"}
    ]
    assert len(rows) == 2 * (len(plan.source) - 1)
    again = smoke_copy.run("smoke", [steps, *ONLY_PRUNE])
    assert not_cached(again) == set()


def test_whole_experts_then_channels_of_those_that_are_left(
    smoke_copy: Home, offline_root: Path, tmp_path: Path, filled: list[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(offline_root / "slimline/tiny-random-llama")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **sizes)
    for part in (MixtralForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "mixtral")
    steps = "steps=[{method: experts, experts: 1}, {method: slimgpt, sparsity: 0.2}]"
    result = smoke_copy.run("smoke", [f"model.id={tmp_path / 'mixtral'}", steps, *ONLY_PRUNE])
    assert filled == ["import-model", "calibrate", "order:dense", "prune:experts-1-experts", "prune:slimgpt-20"]
    (folder,) = result.checkpoints.values()
    shapes = plan_of(folder).shapes
    assert {shape.num_experts for shape in shapes} == {3}
    assert all(shape.intermediate_size < 32 for shape in shapes)
    assert config_shapes(load_checkpoint(Path(str(folder))).config) == shapes
    rows = {row.checkpoint: row for row in smoke_copy.results.checkpoints(result.run_key)}
    assert rows["slimgpt-20"].method == "experts+slimgpt"
    asked = checkpoint_runs(smoke_copy, result)["experts-1-experts"].data.params["sparsity"]
    assert asked == "1 experts"


TRAINED = (
    "{{method: {}, sparsity: 0.3, data: {{dataset: {}}}, max_steps: 4, batch_size: 4, dtype: float32, "
    "num_tokens: 1024, seq_len: 64, max_length: 256, learning_rate: 0.001}}"
)


def test_methods_that_train_follow_each_other_without_calibration(smoke_copy: Home, filled: list[str]) -> None:
    loraprune, compresso = TRAINED.format("loraprune", "slimline/news"), TRAINED.format("compresso", "alpaca-like")
    compresso = compresso.replace("alpaca-like", "slimline/instructions, template: alpaca")
    asked = [f"steps=[{loraprune}, {compresso}]", "calibration=null", *ONLY_PRUNE]
    result = smoke_copy.run("smoke", asked)
    assert filled == ["prune:loraprune-30", "prune:compresso-30"]
    one, other = (
        smoke_copy.store.path(ArtifactRef(kind="checkpoint", key=stage.key))
        for stage in result.stages
        if stage.name.startswith("prune:")
    )
    first, both = plan_of(str(one)), plan_of(str(other))
    assert result.checkpoints == {"compresso-30": str(other)}
    assert both.source == first.source
    assert config_shapes(load_checkpoint(other).config) == both.shapes != first.shapes
    report = json.loads((other / "pruning.json").read_text(encoding="utf-8"))
    assert 0.2 < report["achieved_sparsity"] < 0.4
    shown = {row.metric for row in smoke_copy.results.curves(result.run_key)}
    assert {"train_loss", "sparsity", "expected_sparsity", "multiplier"} <= shown
    assert len(smoke_copy.results.layers(result.run_key)) == 4 * len(both.source)
    again = smoke_copy.run("smoke", asked)
    assert not_cached(again) == set()


def test_one_impossible_branch_leaves_the_other_alone(smoke_copy: Home) -> None:
    from flows.run.outcome import StagesFailed

    with pytest.raises(StagesFailed) as caught:
        smoke_copy.run("smoke", ["steps=[{method: magnitude, sparsity: [0.2, 0.99]}]", *ONLY_PRUNE])
    told = statuses(caught.value.result)
    assert told["prune:magnitude-20"] == "completed"
    assert told["prune:magnitude-99"] == "failed"


def test_the_outcome_says_what_each_site_scored(smoke_copy: Home) -> None:
    result = smoke_copy.run("smoke", ["steps=[{method: wanda_sp, sparsity: 0.3}]", *ONLY_PRUNE])
    (folder,) = result.checkpoints.values()
    rows = smoke_copy.results.layers(result.run_key)
    assert any(row.score is not None and row.measured_error is None for row in rows)
    layers = json.loads((Path(str(folder)) / "pruning.json").read_text(encoding="utf-8"))["layers"]
    assert all((row["score"] is None) == (row["kept"] == row["total"]) for row in layers)
