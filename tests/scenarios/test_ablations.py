"""The specs of SlimGPT's ablations: complete, solvable on the model they name, and planned without network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from flows.records.tables import protocol_lines
from flows.run.graph import StageGraph
from flows.run.locate import locate
from flows.run.stages import build_stages
from flows.spec.load import dump_spec, load_spec, shipped_specs
from flows.spec.run import RunSpec
from flows.spec.steps import PruneStep
from infra.sources.find import Sources
from pruning.allocation.budget import Allocation, removed_parameters
from pruning.allocation.schedule import solve_budgets
from tests.pruning.allocation.test_schedule import MODELS

ABLATIONS = [name for name in shipped_specs() if "-table" in name or "-figure" in name or name.endswith("-ablation")]
SHAPES = {"huggyllama/llama-7b": "LLaMA-7B", "HuggingFaceTB/SmolLM2-135M-Instruct": "SmolLM2-135M"}


def steps(spec: RunSpec) -> dict[str, PruneStep]:
    """The prune step behind each checkpoint."""
    return {made.name: made.step for made in spec.derivations if isinstance(made.step, PruneStep)}


def planned(spec: RunSpec, mirror: Path) -> StageGraph:
    """The stages of a spec whose model and data sets are folders of a few bytes."""
    calibrations = [spec.calibration_of(made) for made in spec.derivations]
    needed = {spec.model.id, *(asked.data.dataset for asked in calibrations if asked is not None)}
    needed |= {need.repo_id for entry in spec.evals for need in entry.module.needs(entry.config)}
    for repo_id in needed:
        (mirror / repo_id).mkdir(parents=True)
        (mirror / repo_id / "data.txt").write_text(repo_id, encoding="utf-8")
    return build_stages(spec, locate(spec, Sources((mirror,), None, False, home=mirror / "home")), "cpu")


def test_every_table_and_figure_has_its_spec() -> None:
    tables = {f"llama-7b-slimgpt-{place}" for place in ("table5", "table6", "table14", "figure2", "figure3", "figure4")}
    assert set(ABLATIONS) == tables | {"smollm2-135m-ablation", "smollm2-135m-figures"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_the_protocol_is_complete(name: str) -> None:
    spec = load_spec(name)
    assert spec.model.dtype != "auto"
    assert spec.calibration is not None
    assert spec.calibration.data.data_files == "en/c4-train.00000-of-01024.json.gz"
    assert {"num_samples", "seq_len", "seed"} <= spec.calibration.model_fields_set
    assert all(step.config.split == "equal" for step in steps(spec).values())
    suites = {entry.suite: entry for entry in spec.evals}
    perplexity = suites["perplexity"].config
    assert (perplexity.dataset, perplexity.config, perplexity.split) == (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        "test",
    )
    assert all(entry.on == "all" for entry in spec.evals)
    if name.startswith("llama"):
        assert (perplexity.windows, perplexity.bos, perplexity.max_windows) == ((128,), "once", None)
        assert ("zero_shot" in suites) == (name != "llama-7b-slimgpt-figure2")
        assert not any(entry.suite == "zero_shot" and entry.config.limit for entry in spec.evals)
    else:
        assert (perplexity.windows, perplexity.bos, perplexity.max_windows, perplexity.window_seed) == (
            (1024,),
            "none",
            8,
            1,
        )
        assert (spec.calibration.num_samples, spec.calibration.seq_len, spec.calibration.seed) == (32, 512, 0)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_is_a_branch_of_its_own(name: str, tmp_path: Path) -> None:
    spec = load_spec(name)
    graph = planned(spec, tmp_path / "mirror")
    pruned = {made: graph.checkpoints[made].key for made in steps(spec)}
    # samples-256 and tokens-2048 are one point of figure 3
    assert len(set(pruned.values())) == len(pruned) - name.endswith(("-figure3", "-figures"))
    asked = {entry.label for entry in spec.evals}
    assert {stage.name for stage in graph.reports} == {
        f"evaluate:{label}:{checkpoint}" for label in asked for checkpoint in spec.checkpoints
    }


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_branch_can_be_solved_on_its_model(name: str) -> None:
    spec = load_spec(name)
    source, cost = MODELS[SHAPES[spec.model.id]]
    for step in steps(spec).values():
        config = step.config
        allocation = Allocation(
            sparsity=config.sparsity,
            curve=config.curve,
            start_over_end=config.start_over_end,
            protect_first=config.protect_first,
            protect_last=config.protect_last,
            end_points=config.end_points,
        )
        removed = removed_parameters(solve_budgets(source, cost, allocation), source, cost, "kv_group")
        assert removed / sum(map(cost.parameters, source)) == pytest.approx(config.sparsity, abs=0.002)


def test_table_5_takes_one_thing_away_at_a_time() -> None:
    options = {name: step.config for name, step in steps(load_spec("llama-7b-slimgpt-table5")).items()}
    full = options.pop("full")
    assert (full.grouped_cholesky, full.group_size, full.curve, full.sparsity) == (True, None, "log_increase", 0.5)
    for name, config in options.items():
        changed = {key for key, value in config if value != getattr(full, key)}
        assert changed == ({"grouped_cholesky"} if name == "no-gcd" else {"group_size"})


@pytest.mark.parametrize("name", ["llama-7b-slimgpt-table6", "smollm2-135m-ablation"])
def test_table_6_has_the_five_curves(name: str) -> None:
    curves = {made: step.config.curve for made, step in steps(load_spec(name)).items() if not made.startswith("no-")}
    assert curves == {
        curve.replace("_", "-"): curve
        for curve in ("log_increase", "linear_increase", "uniform", "log_decrease", "linear_decrease")
    }


def test_table_14_has_the_calibration_sets() -> None:
    spec = load_spec("llama-7b-slimgpt-table14")
    sets = {made.name: spec.calibration_of(made) for made in spec.derivations}
    told = {name: (asked.data.dataset, asked.data.columns, asked.data.rows) for name, asked in sets.items() if asked}
    records = ("instruction", "input", "output")
    assert told == {
        "c4": ("allenai/c4", ("text",), "documents"),
        "alpaca": ("yahma/alpaca-cleaned", records, "documents"),
        "gpt4-alpaca": ("vicgalle/alpaca-gpt4", records, "documents"),
        "wikitext2": ("Salesforce/wikitext", ("text",), "lines"),
    }
    assert all(asked is not None and (asked.num_samples, asked.seq_len) == (256, 2048) for asked in sets.values())


def test_a_preset_in_a_variant_is_written_out_wherever_it_is_told() -> None:
    dumped = yaml.safe_load(dump_spec(load_spec("llama-7b-slimgpt-table14")))
    alpaca = {"dataset": "yahma/alpaca-cleaned", "template": "alpaca"}
    assert dumped["steps"][0]["variants"]["alpaca"] == {"calibration": {"data": alpaca}}
    lines = protocol_lines([], dumped)
    assert any(line.startswith("variant alpaca: ") and "yahma/alpaca-cleaned" in line for line in lines)
    assert any(line.startswith("calibration: ") and "c4-train.00000-of-01024" in line for line in lines)


@pytest.mark.parametrize(("name", "share"), [("first-25", 0.25), ("first-50", 0.5), ("first-75", 0.75)])
def test_figure_2_prunes_the_first_layer_alone(name: str, share: float) -> None:
    step = steps(load_spec("llama-7b-slimgpt-figure2"))[name]
    source, cost = MODELS["LLaMA-7B"]
    config = step.config
    allocation = Allocation(
        config.sparsity, config.curve, protect_last=config.protect_last, end_points=config.end_points
    )
    first, *others = solve_budgets(source, cost, allocation)
    assert (first.head_units, first.channels) == (32 * share, 11008 * share)
    assert not any(budget.head_units or budget.channels for budget in others)


def test_figure_3_changes_one_number_at_a_time() -> None:
    spec = load_spec("llama-7b-slimgpt-figure3")
    sets = {made.name: spec.calibration_of(made) for made in spec.derivations}
    points = {name: (asked.num_samples, asked.seq_len) for name, asked in sets.items() if asked is not None}
    assert points == {f"samples-{2**k}": (2**k, 2048) for k in range(7, 12)} | {
        f"tokens-{2**k}": (256, 2**k) for k in range(6, 12)
    }


def test_figure_4_has_llm_pruners_layers_beside_the_log_curve() -> None:
    options = {name: step.config for name, step in steps(load_spec("llama-7b-slimgpt-figure4")).items()}
    source, cost = MODELS["LLaMA-7B"]
    config = options["llm-pruner-ratios"]
    budgets = solve_budgets(
        source,
        cost,
        Allocation(0.5, config.curve, protect_first=config.protect_first, protect_last=config.protect_last),
    )
    whole = [i for i, budget in enumerate(budgets) if not budget.channels]
    assert whole == [0, 1, 2, 3, 30, 31]
    ratios = [budget.channels / 11008 for budget in budgets if budget.channels]
    assert max(ratios) - min(ratios) < 0.001
    assert math.isclose(ratios[0], 0.5 * 32 / 26, abs_tol=0.005)
    assert options["log-increase"].curve == "log_increase"
