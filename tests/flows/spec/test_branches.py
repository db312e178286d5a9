"""A spec with several sparsities or variants: its names, its stages, and what it refuses. Nothing runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flows.errors import SpecError
from flows.run.graph import StageGraph
from flows.spec.load import dump_spec, load_spec, parse_spec
from flows.spec.run import RunSpec
from tests.flows.run.test_stages import keys, make_mirror, planned

LORA = "{recovery: lora, data: {dataset: slimline/instructions}}"
VARIANTS = "full: , no-gcd: {grouped_cholesky: false}, 16: {calibration: {num_samples: 16}}"


def smoke(*overrides: str) -> RunSpec:
    return load_spec("smoke", overrides)


def names(*overrides: str) -> tuple[str, ...]:
    """The checkpoints after the dense one."""
    return smoke(*overrides).checkpoints[1:]


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return make_mirror(tmp_path / "mirror")


def test_every_sparsity_is_a_branch_with_all_later_steps() -> None:
    assert names("steps.0.sparsity=[0.2, 0.125]") == (
        "slimgpt-20",
        "slimgpt-20+lora",
        "slimgpt-12.5",
        "slimgpt-12.5+lora",
    )


def test_a_list_of_one_is_a_single_value() -> None:
    assert smoke("steps.0.sparsity=[0.2]") == smoke("steps.0.sparsity=0.2")
    assert names("steps.0.sparsity=[0.2]", "steps.0.name=x", "steps.1.name=y") == ("x", "y")


def test_names_given_to_steps_are_told_apart_by_the_branch() -> None:
    named = ("steps.0.name=x", "steps.1.name=y")
    assert names("steps.0.sparsity=[0.2, 0.5]", *named) == ("x-20", "y-20", "x-50", "y-50")
    variants = "steps.0.variants={a: {}, b: {curve: uniform}}"
    assert names(variants, *named) == ("x-a", "y-a", "x-b", "y-b")
    assert names(variants, "steps.0.sparsity=[0.2, 0.5]", *named)[:4] == ("x-a-20", "y-a-20", "x-a-50", "y-a-50")


def test_variants_are_named_as_they_are_called() -> None:
    variants = f"steps.0.variants={{{VARIANTS}}}"
    assert names(variants) == ("full", "full+lora", "no-gcd", "no-gcd+lora", "16", "16+lora")
    several = names(variants, "steps.0.sparsity=[0.2, 0.5]")
    assert several[::2] == ("full-20", "full-50", "no-gcd-20", "no-gcd-50", "16-20", "16-50")


def test_a_variant_may_have_sparsities_of_its_own() -> None:
    assert names("steps.0.variants={a: , b: {sparsity: [0.3, 0.4]}, c: {sparsity: 0.5}}")[::2] == (
        "a",
        "b-30",
        "b-40",
        "c",
    )


def test_branches_may_branch_again() -> None:
    steps = f"steps=[{{method: slimgpt, sparsity: [0.2, 0.3]}}, {LORA}, {{method: slimgpt, sparsity: [0.4, 0.5]}}]"
    assert names(steps)[:4] == (
        "slimgpt-20",
        "slimgpt-20+lora",
        "slimgpt-20+lora+slimgpt-40",
        "slimgpt-20+lora+slimgpt-50",
    )
    assert names(steps, "steps.2.name=twice")[2:4] == ("twice-20-40", "twice-20-50")


def test_each_branch_has_its_own_typed_values() -> None:
    spec = smoke(f"steps.0.variants={{{VARIANTS}}}", "steps.0.sparsity=[0.2, 0.5]", "steps.0.curve=uniform")
    made = {derivation.name: derivation for derivation in spec.derivations}
    assert made["full-50"].step.config.sparsity == 0.5
    assert made["no-gcd-20"].step.config.grouped_cholesky is False
    assert made["no-gcd-20"].step.config.curve == "uniform"
    assert made["full-20"].step.config.grouped_cholesky is True
    calibrations = {name: spec.calibration_of(derivation) for name, derivation in made.items()}
    assert calibrations["full-20"] == spec.calibration
    changed = calibrations["16-20"]
    assert changed is not None
    assert spec.calibration is not None
    assert changed.num_samples == 16
    assert changed.model_copy(update={"num_samples": 8}) == spec.calibration
    assert (made["16-50+lora"].source, made["16-50"].source) == ("16-50", "dense")


@pytest.mark.parametrize(
    "overrides",
    [
        ["steps.0.sparsity=[0.2, 0.5]"],
        [f"steps.0.variants={{{VARIANTS}}}"],
        [f"steps.0.variants={{{VARIANTS}}}", "steps.0.sparsity=[0.5, 0.2]"],
        ["steps.0.variants={a: {calibration: {data: c4, seq_len: 32}}}"],
    ],
)
def test_branches_survive_yaml(overrides: list[str]) -> None:
    spec = smoke(*overrides)
    text = dump_spec(spec)
    again = parse_spec(yaml.safe_load(text), source="dump")
    assert again == spec
    assert dump_spec(again) == text
    assert [made.step for made in again.derivations] == [made.step for made in spec.derivations]


def test_a_list_is_dumped_as_a_list_and_a_value_as_a_value() -> None:
    several = yaml.safe_load(dump_spec(smoke("steps.0.sparsity=[0.2, 0.5]", "steps.0.variants={full: }")))
    assert several["steps"][0]["sparsity"] == [0.2, 0.5]
    assert several["steps"][0]["variants"] == {"full": {}}
    assert yaml.safe_load(dump_spec(smoke()))["steps"][0]["sparsity"] == 0.2


def test_set_reaches_into_lists_and_variants() -> None:
    spec = smoke(
        "steps.0.sparsity=[0.2, 0.5]",
        "steps.0.sparsity.1=0.4",
        "steps.0.variants.a.curve=uniform",
        "steps.0.variants.a.calibration.seq_len=32",
    )
    assert spec.checkpoints[1::2] == ("a-20", "a-40")
    assert spec.derivations[0].changes.calibration == {"seq_len": 32}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("steps.0.sparsity=[]", "steps.0: slimgpt: sparsity = []: an empty list asks for nothing"),
        ("steps.0.sparsity=[0.2, 1.5]", "steps.0: slimgpt: sparsity = 1.5: input should be less than 1"),
        ("steps.0.sparsity=[0, 0.2]", "steps.0: slimgpt: sparsity = 0: input should be greater than 0"),
        ("steps.0.sparsity=[0.2, few]", "steps.0: slimgpt: sparsity = 'few': input should be a valid number"),
        ("steps.0.sparsity=[0.2, 0.20]", "sparsity = [0.2, 0.2]: 0.2 is there twice"),
        ("steps.0.sparsity=[0.3333333, 0.33333331]", "two checkpoints are called 'slimgpt-33.3333'"),
        ("steps.0.sparsities=[0.2]", "unknown key 'sparsities'; did you mean 'sparsity'?"),
        ("steps.0.variants={a: {grouped_choleski: false}}",
         "steps.0: slimgpt: variants.a: unknown key 'grouped_choleski'; did you mean 'grouped_cholesky'?"),
        ("steps.0.variants={a: {calibratoin: {}}}", "unknown key 'calibratoin'; did you mean 'calibration'?"),
        ("steps.0.variants={a: {curve: flat}}", "steps.0: slimgpt: variants.a: curve = 'flat': input should be"),
        ("steps.0.variants={a: {sparsity: [0.2, 2]}}", "variants.a: sparsity = 2: input should be less than 1"),
        ("steps.0.variants={a: {sparsity: []}}", "variants.a: sparsity = []: an empty list"),
        ("steps.0.variants={a: {calibration: {num_sampels: 3}}}",
         "variants.a.calibration: unknown key 'num_sampels'; did you mean 'num_samples'?"),
        ("steps.0.variants={a: {calibration: {seq_len: 1}}}", "variants.a.calibration: seq_len = 1: input should be"),
        ("steps.0.variants={a: {calibration: {data: c5}}}", "a.calibration: data: unknown calibration set 'c5'"),
        ("steps.0.variants={a: 3}", "steps.0.variants.a = 3: input should be a mapping"),
        ("steps.0.variants=[a]", "steps.0.variants = ['a']: input should be a mapping"),
        ("steps.0.variants={two words: {}}", "steps.0.variants.two words = 'two words'"),
        ("steps.0.variants={dense: {}}", "two checkpoints are called 'dense'"),
        ("steps.1.variants={a: {}}", "steps.1: lora: unknown key 'variants'"),
        ("steps=[{method: slimgpt, sparsity: [0.2, 0.3], name: x}, {recovery: lora, name: x}]",
         "two checkpoints are called 'x-20'"),
        ("steps=[{method: slimgpt, sparsity: 0.2, variants: {a: }}, {method: slimgpt, sparsity: 0.2, variants: {a: }}]",
         "two variants are called 'a'"),
    ],
)  # fmt: skip
def test_what_a_branch_may_not_be_is_refused_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(SpecError) as caught:
        smoke(override)
    assert str(caught.value).startswith("smoke: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_checkpoint_is_answered_with_those_of_all_branches() -> None:
    with pytest.raises(SpecError, match=r"'slimgpt-51'; did you mean 'slimgpt-50'\?.*slimgpt-20\+lora, slimgpt-50, "):
        smoke("steps.0.sparsity=[0.2, 0.5]", "profile.on=[slimgpt-51]")


def test_variants_with_calibrations_of_their_own_need_none_of_the_run() -> None:
    data = "data: {dataset: slimline/news}, seq_len: 64, num_samples: 8"
    both = f"steps.0.variants={{a: {{calibration: {{{data}}}}}, b: {{calibration: {{{data}, seed: 1}}}}}}"
    assert names("calibration=null", both)[::2] == ("a", "b")
    with pytest.raises(SpecError, match="steps prune but there is no `calibration`"):
        smoke("calibration=null", both, "steps.0.variants.b=null")


def names_of(graph: StageGraph, *starts: str) -> list[str]:
    return [stage.name for stage in graph.stages if stage.name.startswith(starts)]


def test_branches_are_the_runs_that_they_stand_for(mirror: Path) -> None:
    """Stages of a run with two sparsities are those of two runs with one each: nothing is made again."""
    both = keys(planned(mirror, "steps.0.sparsity=[0.2, 0.5]"))
    assert both == keys(planned(mirror)) | keys(planned(mirror, "steps.0.sparsity=0.5"))
    assert len([name for name in both if name.endswith(":dense")]) == 3


def test_the_order_of_stages_suits_their_inputs(mirror: Path) -> None:
    graph = planned(mirror, f"steps.0.variants={{{VARIANTS}}}", "steps.0.sparsity=[0.2, 0.5]")
    seen: set[str] = set()
    for stage in graph.stages:
        assert {ref.key for ref in stage.request.inputs} <= seen, stage.name
        seen.add(stage.ref.key)
    assert len({stage.name for stage in graph.stages}) == len(graph.stages) == len(seen)


def test_one_capture_serves_all_sparsities_and_solvers(mirror: Path) -> None:
    graph = planned(
        mirror,
        "steps.0.sparsity=[0.2, 0.25, 0.33, 0.5]",
        "steps.0.propagate_error=false",
        f"steps.0.variants={{{VARIANTS}, walked: {{propagate_error: true}}}}",
    )
    assert names_of(graph, "calibrate", "capture", "order") == [
        "calibrate",
        "capture:dense",
        "order:dense",
        "order:dense:no-gcd",
        "calibrate:16",
        "capture:dense:16",
        "order:dense:16",
    ]
    assert len(names_of(graph, "prune")) == 4 * 4
    assert len(keys(graph)) == len(graph.stages), "no two stages have one name"


def test_a_calibration_that_is_the_runs_own_is_the_runs(mirror: Path) -> None:
    graph = planned(mirror, "steps.0.variants={n-8: {calibration: {num_samples: 8}}, full: {}}")
    assert names_of(graph, "calibrate", "prune") == ["calibrate", "prune:n-8"]


def test_a_second_step_captures_each_branch(mirror: Path) -> None:
    steps = "steps=[{method: slimgpt, sparsity: [0.2, 0.3]}, {method: slimgpt, sparsity: 0.4, propagate_error: false}]"
    assert names_of(planned(mirror, steps), "capture") == ["capture:slimgpt-20", "capture:slimgpt-30"]


def test_names_that_mean_the_same_are_one_stage_and_two_columns(mirror: Path) -> None:
    graph = planned(
        mirror, "steps.0.variants={full: , paper: {curve: log_increase}}", "profile=null", "evals.1.on=[paper]"
    )
    assert names_of(graph, "prune", "recover") == ["prune:full", "recover:full+lora"]
    assert graph.aliases == {"paper": "full", "paper+lora": "full+lora"}
    assert [(stage.name, stage.checkpoint) for stage in graph.reports] == [
        ("evaluate:perplexity:dense", "dense"),
        ("evaluate:perplexity:full", "full"),
        ("evaluate:perplexity:full+lora", "full+lora"),
        ("evaluate:perplexity:paper", "paper"),
        ("evaluate:perplexity:paper+lora", "paper+lora"),
        ("evaluate:zero_shot:paper", "paper"),
    ]


def test_the_branches_are_part_of_the_runs_identity(mirror: Path) -> None:
    first = planned(mirror, "steps.0.sparsity=[0.2, 0.5]").run_key
    assert planned(mirror, "steps.0.sparsity=[0.2, 0.4]").run_key != first
    assert planned(mirror).run_key != first
    assert planned(mirror, "steps.0.sparsity=[0.2, 0.50]", "description=x").run_key == first


def test_the_outline_is_a_tree(mirror: Path) -> None:
    graph = planned(mirror, "steps.0.sparsity=[0.2, 0.5]", "evals.1.on=[dense]", "profile=null")
    assert [(depth, stage.name) for depth, stage in graph.outline] == [
        (0, "import-model"),
        (1, "calibrate"),
        (1, "evaluate:perplexity:dense"),
        (1, "evaluate:zero_shot:dense"),
        (1, "prune:slimgpt-20"),
        (2, "evaluate:perplexity:slimgpt-20"),
        (2, "recover:slimgpt-20+lora"),
        (3, "evaluate:perplexity:slimgpt-20+lora"),
        (1, "prune:slimgpt-50"),
        (2, "evaluate:perplexity:slimgpt-50"),
        (2, "recover:slimgpt-50+lora"),
        (3, "evaluate:perplexity:slimgpt-50+lora"),
    ]
    assert {stage.name for _, stage in graph.outline} == set(keys(graph))
