"""Which stages follow from a spec, and what their keys depend on. Nothing runs: sources are folders of a few bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import evaluation.suites.perplexity
import pruning.methods.slimgpt
import pruning.recovery.lora
import tasks.requests
from flows.errors import SpecError
from flows.run.compress import in_order_of_submission
from flows.run.graph import StageGraph
from flows.run.locate import locate
from flows.run.stages import build_stages
from flows.spec.load import load_spec
from infra.settings import Settings
from infra.sources.find import Sources
from tasks.requests import IMPORT_VERSION
from tests.flows.home import PROJECT

REPOSITORIES = ("tiny-random-llama", "news", "wikipedia", "instructions")
SPEC = ("mirror=null",)

CALIBRATION = {"calibrate"}
PRUNED = {"prune:slimgpt-20", "evaluate:perplexity:slimgpt-20", "evaluate:zero_shot:slimgpt-20", "profile:slimgpt-20"}
RECOVERED = {
    "recover:slimgpt-20+lora",
    "evaluate:perplexity:slimgpt-20+lora",
    "evaluate:zero_shot:slimgpt-20+lora",
    "profile:slimgpt-20+lora",
}
PERPLEXITY = {f"evaluate:perplexity:{name}" for name in ("dense", "slimgpt-20", "slimgpt-20+lora")}
ZERO_SHOT = {f"evaluate:zero_shot:{name}" for name in ("dense", "slimgpt-20", "slimgpt-20+lora")}
PROFILES = {f"profile:{name}" for name in ("dense", "slimgpt-20", "slimgpt-20+lora")}
EVERYTHING = CALIBRATION | PRUNED | RECOVERED | PERPLEXITY | ZERO_SHOT | PROFILES | {"import-model"}


def make_mirror(root: Path) -> Path:
    for repo_id in [f"slimline/{name}" for name in REPOSITORIES] + ["baber/piqa"]:
        (root / repo_id).mkdir(parents=True)
        (root / repo_id / "data.txt").write_text(f"content of {repo_id}", encoding="utf-8")
    return root


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return make_mirror(tmp_path / "mirror")


def planned(mirror: Path, *overrides: str, device: str = "cpu") -> StageGraph:
    spec = load_spec("smoke", [*SPEC, *overrides])
    return build_stages(spec, locate(spec, Sources((mirror,), None, False, home=mirror.parent / "home")), device)


def keys(graph: StageGraph) -> dict[str, str]:
    return {stage.name: stage.ref.key for stage in graph.stages}


def changed(before: StageGraph | dict[str, str], after: StageGraph) -> set[str]:
    old, new = before if isinstance(before, dict) else keys(before), keys(after)
    assert set(old) == set(new)
    return {name for name in old if old[name] != new[name]}


def test_stages_come_after_what_they_read(mirror: Path) -> None:
    graph = planned(mirror, "steps.0.propagate_error=false")
    seen = set()
    for stage in graph.stages:
        assert {ref.key for ref in stage.request.inputs} <= seen, stage.name
        seen.add(stage.ref.key)
    assert set(keys(graph)) == EVERYTHING | {"capture:dense", "order:dense"}
    assert len({stage.ref.key for stage in graph.stages}) == len(graph.stages)


def test_keys_say_what_and_which_version(mirror: Path) -> None:
    graph = keys(planned(mirror))
    version = pruning.methods.slimgpt.VERSION
    assert graph["import-model"].startswith(f"import-model-v{IMPORT_VERSION}-")
    assert graph["prune:slimgpt-20"].startswith(f"prune-slimgpt-v{version}-")
    assert graph["evaluate:zero_shot:dense"].startswith("evaluate-zero-shot-v")


def test_keys_are_equal_in_another_process(mirror: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.flows.run.test_stages import keys, planned\n"
        "print(*keys(planned(Path(sys.argv[1]))).values())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(mirror)],
        cwd=PROJECT,
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert child.stdout.split() == list(keys(planned(mirror)).values())


def test_where_things_lie_is_in_no_key(mirror: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "deep"
    before = planned(mirror)
    shutil.copytree(mirror, elsewhere)
    shutil.rmtree(mirror)
    after = planned(elsewhere)
    assert changed(before, after) == set()
    assert after.run_key == before.run_key


@pytest.mark.parametrize(
    "variable, value",
    [
        ("SLIMLINE_EVAL_BATCH_SIZE", "3"),
        ("SLIMLINE_WALK_BATCH_SIZE", "3"),
        ("SLIMLINE_ACTIVATION_BUDGET_GIB", "0.5"),
        ("SLIMLINE_HOME", "/nowhere/else"),
        ("SLIMLINE_MIRROR", "/nowhere"),
    ],
)
def test_how_is_in_no_key(variable: str, value: str, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = planned(mirror)
    monkeypatch.setenv(variable, value)
    Settings()
    assert changed(before, planned(mirror)) == set()


def test_the_device_is_in_no_key_but_that_of_a_profile(mirror: Path) -> None:
    assert changed(planned(mirror), planned(mirror, device="another device")) == PROFILES


def test_stages_are_built_without_a_look_at_the_sources(mirror: Path) -> None:
    spec = load_spec("smoke", SPEC)
    identities = locate(spec, Sources((mirror,), None, False, home=mirror.parent / "home"))
    before = keys(build_stages(spec, identities, "cpu"))
    shutil.rmtree(mirror)
    assert keys(build_stages(spec, identities, "cpu")) == before


def test_a_stage_may_be_called_by_what_its_name_begins_with(mirror: Path) -> None:
    graph = planned(
        mirror, "steps.0.variants={short: {calibration: {num_samples: 4}}}", "steps.0.propagate_error=false"
    )
    assert {stage.name: stage.names for stage in graph.stages if "lora" not in stage.name} == {
        "import-model": ("import-model",),
        "calibrate:short": ("calibrate", "calibrate:short"),
        "capture:dense:short": ("capture", "capture:dense", "capture:dense:short"),
        "order:dense:short": ("order", "order:dense", "order:dense:short"),
        "prune:short": ("prune", "prune:short"),
        "profile:dense": ("profile", "profile:dense"),
        "profile:short": ("profile", "profile:short"),
    } | {
        f"evaluate:{suite}:{name}": ("evaluate", f"evaluate:{suite}", f"evaluate:{suite}:{name}")
        for suite in ("perplexity", "zero_shot")
        for name in ("dense", "short")
    }


def test_the_evaluations_of_a_checkpoint_are_submitted_next_to_each_other(mirror: Path) -> None:
    """So that a device, which is given to who comes first, loads each model once; the graph keeps the spec's order."""
    graph = planned(mirror, "evals.0.on=[slimgpt-20+lora, slimgpt-20, dense]")
    submitted = in_order_of_submission(graph)
    assert sorted(stage.name for stage in submitted) == sorted(stage.name for stage in graph.stages)
    made, measured = submitted[:4], submitted[4:]
    assert [stage.action for stage in made] == ["import-model", "calibrate", "prune", "recover"]
    assert [stage.name for stage in measured] == [
        *(f"evaluate:{suite}:{name}" for name in graph.checkpoints for suite in ("perplexity", "zero_shot")),
        *(f"profile:{name}" for name in graph.checkpoints),
    ]


@pytest.mark.parametrize(
    "override",
    ["description=other", "mirror=[hub]", "evals.0.name=perplexity", "steps.0.name=slimgpt-20", "profile.on=all"],
)
def test_words_are_in_no_key(override: str, mirror: Path) -> None:
    assert changed(planned(mirror), planned(mirror, override)) == set()


@pytest.mark.parametrize(
    "overrides, stages",
    [
        ("model.dtype=bfloat16", EVERYTHING),
        ("calibration.seed=1", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.num_samples=9", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.seq_len=65", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.num_heldout=3", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.join=' '", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.dataset=slimline/wikipedia", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.config=other", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.split=test", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.text_field=body", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.data_files=a.json", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.rows=lines", CALIBRATION | PRUNED | RECOVERED),
        ("calibration.data.template=alpaca", CALIBRATION | PRUNED | RECOVERED),
        ("steps.0.dampening_frac=0.02", PRUNED | RECOVERED),
        ("steps.0.curve=uniform", PRUNED | RECOVERED),
        ("steps.0.group_size=8", PRUNED | RECOVERED),
        ("steps.0.grouped_cholesky=false", PRUNED | RECOVERED),
        ("steps.0.split=half", PRUNED | RECOVERED),
        ("steps.0.protect_first=1", PRUNED | RECOVERED),
        ("steps.1.rank=4", RECOVERED),
        ("steps.1.learning_rate=0.001", RECOVERED),
        ("steps.1.seed=1", RECOVERED),
        ("steps.1.max_steps=5", RECOVERED),
        ("steps.1.data.dataset=slimline/news", RECOVERED),
        ("steps.1.data.output=answer", RECOVERED),
        ("evals.0.windows=[32]", PERPLEXITY),
        ("evals.0.bos=none", PERPLEXITY),
        ("evals.0.dataset=slimline/news", PERPLEXITY),
        ("evals.1.limit=5", ZERO_SHOT),
        ("evals.1.num_fewshot=1", ZERO_SHOT),
        ("profile.settings.runs=3", PROFILES),
        ("profile.settings.prompt_len=32", PROFILES),
    ],
)
def test_a_field_changes_its_stage_and_what_follows(overrides: str, stages: set[str], mirror: Path) -> None:
    before, after = planned(mirror), planned(mirror, overrides)
    assert changed(before, after) == stages
    assert before.run_key != after.run_key


def test_every_config_field_of_every_step_and_eval_is_in_the_key(mirror: Path) -> None:
    for stage in planned(mirror).stages:
        config = getattr(stage.request, "typed_config", None)
        if config is not None:
            assert stage.request.config == config.model_dump(mode="json"), stage.name


def test_sparsity_changes_the_pruning_and_the_names(mirror: Path) -> None:
    before, after = planned(mirror), planned(mirror, "steps.0.sparsity=0.3", "steps.0.name=slimgpt-20")
    assert changed(before, after) == PRUNED | RECOVERED
    assert "prune:slimgpt-30" in keys(planned(mirror, "steps.0.sparsity=0.3"))


def test_the_dense_statistics_serve_every_sparsity(mirror: Path) -> None:
    two = "steps=[{method: slimgpt, sparsity: 0.2, propagate_error: false, name: a}]"
    other = "steps=[{method: slimgpt, sparsity: 0.3, propagate_error: false, name: a}]"
    assert keys(planned(mirror, two))["capture:dense"] == keys(planned(mirror, other))["capture:dense"]


@pytest.mark.parametrize(
    "repo_id, stages",
    [
        ("slimline/tiny-random-llama", EVERYTHING),
        ("slimline/news", CALIBRATION | PRUNED | RECOVERED),
        ("slimline/instructions", RECOVERED),
        ("slimline/wikipedia", PERPLEXITY),
        ("baber/piqa", ZERO_SHOT),
    ],
)
def test_new_content_changes_the_keys_of_those_who_read_it(repo_id: str, stages: set[str], mirror: Path) -> None:
    before = planned(mirror)
    (mirror / repo_id / "data.txt").write_text("another content", encoding="utf-8")
    assert changed(before, planned(mirror)) == stages


@pytest.mark.parametrize(
    "module, stages",
    [
        (pruning.methods.slimgpt, PRUNED | RECOVERED),
        (pruning.recovery.lora, RECOVERED),
        (evaluation.suites.perplexity, PERPLEXITY),
    ],
)
def test_a_new_version_of_a_plugin_changes_its_stage_and_what_follows(
    module: ModuleType, stages: set[str], mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(planned(mirror))
    monkeypatch.setattr(module, "VERSION", module.VERSION + 1)
    assert changed(before, planned(mirror)) == stages


@pytest.mark.parametrize(
    "request_class, stages",
    [
        ("ImportRequest", EVERYTHING),
        ("CalibrateRequest", CALIBRATION | PRUNED | RECOVERED),
        ("ProfileRequest", PROFILES),
    ],
)
def test_a_new_version_of_a_stage_changes_it_and_what_follows(
    request_class: str, stages: set[str], mirror: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = keys(planned(mirror))
    monkeypatch.setattr(getattr(tasks.requests, request_class), "VERSION", 99)
    assert changed(before, planned(mirror)) == stages


def test_two_names_for_one_question_are_one_stage_each(mirror: Path) -> None:
    twice = "evals=[{suite: zero_shot, tasks: [piqa], name: a}, {suite: zero_shot, tasks: [piqa], name: b}]"
    names = [stage.name for stage in planned(mirror, twice, "profile=null").stages if stage.ref.kind == "report"]
    assert names == [f"evaluate:a:{checkpoint}" for checkpoint in ("dense", "slimgpt-20", "slimgpt-20+lora")]


def test_the_order_of_evals_is_not_the_order_of_keys(mirror: Path) -> None:
    spec = load_spec("smoke", SPEC)
    assert {entry.label for entry in spec.evals} == {"perplexity", "zero_shot"}
    swapped = "evals=[{suite: zero_shot, tasks: [piqa], limit: 10}]"
    assert (
        keys(planned(mirror, swapped))["evaluate:zero_shot:dense"] == keys(planned(mirror))["evaluate:zero_shot:dense"]
    )


@pytest.mark.parametrize("name", ["Smoke", "my.run", "my_run", "a--b", "a-", "9"])
def test_every_name_that_a_spec_may_have_makes_a_run_key(name: str, mirror: Path) -> None:
    graph = planned(mirror, f"name={name!r}")
    assert graph.run_key.startswith("run-")
    assert graph.run_key != planned(mirror).run_key


def test_names_that_differ_in_punctuation_are_different_runs(mirror: Path) -> None:
    assert planned(mirror, "name=a.b").run_key != planned(mirror, "name=a-b").run_key


def test_measuring_fewer_checkpoints_leaves_the_other_keys(mirror: Path) -> None:
    graph = keys(planned(mirror, "evals.1.on=[dense]", "profile=null"))
    assert set(graph) == EVERYTHING - PROFILES - ZERO_SHOT | {"evaluate:zero_shot:dense"}
    assert graph.items() <= keys(planned(mirror)).items()


SMALLER = "{method: vocabulary, sparsity: 0.2, data: {dataset: slimline/news}}"


def test_after_a_smaller_vocabulary_tokens_and_teacher_are_those_that_it_left(mirror: Path) -> None:
    later = "{method: slimgpt, sparsity: 0.2}, {recovery: reconstruct, num_heldout: 2}"
    graph = planned(mirror, f"steps=[{SMALLER}, {later}]", "evals=[]", "profile=null")
    found, smaller = {stage.name: stage.request for stage in graph.stages}, graph.checkpoints["vocabulary-20"]
    assert list(found) == [
        "import-model", "prune:vocabulary-20", "calibrate:vocabulary-20", "prune:slimgpt-20",
        "recover:slimgpt-20+reconstruct",
    ]  # fmt: skip
    calibration, trained = found["calibrate:vocabulary-20"], found["recover:slimgpt-20+reconstruct"]
    assert calibration.inputs == (smaller,)
    assert trained.inputs == (graph.checkpoints["slimgpt-20"], smaller, calibration.ref)
    assert found["prune:vocabulary-20"].origins == (graph.identities.datasets["slimline/news", None],)
    # where it comes last, what was before it is as it was
    first = "{method: magnitude, sparsity: 0.2}"
    plain, last = planned(mirror, f"steps=[{first}]"), planned(mirror, f"steps=[{first}, {SMALLER}]")
    assert keys(plain).items() < keys(last).items()


def test_exports_are_stages_of_their_own(mirror: Path) -> None:
    plain = planned(mirror)
    asked = planned(mirror, "exports=[{format: gguf, type: q8_0}, {format: gguf, on: [dense]}]")
    added = {stage.name: stage for stage in asked.stages if stage.ref not in {each.ref for each in plain.stages}}
    assert added.keys() == {"export:gguf-q8_0:slimgpt-20+lora", "export:gguf-f16:dense"}
    last = added["export:gguf-q8_0:slimgpt-20+lora"]
    assert last.request.inputs == (plain.checkpoints["slimgpt-20+lora"],)
    assert last.ref.kind == "export"
    assert last.ref.key.startswith("export-v1-")
    assert last.names == ("export", "export:gguf-q8_0", "export:gguf-q8_0:slimgpt-20+lora")
    assert [stage.ref for stage in asked.reports] == [stage.ref for stage in plain.reports]
    assert planned(mirror, "exports=[]").run_key == plain.run_key
    assert "exports" not in plain.spec.model_dump(mode="json")
    with pytest.raises(SpecError, match=r"on: unknown checkpoint 'slimgpt'"):
        planned(mirror, "exports=[{format: gguf, on: [slimgpt]}]")


def test_exported_files_are_measured_beside_the_checkpoints(mirror: Path) -> None:
    one = "exports=[{format: gguf, type: q8_0, on: [dense]}]"
    asked = planned(mirror, "exports=[{format: gguf, type: [q8_0, q4_0], on: [dense], measure: {runs: 2}}]")
    added = {stage.name: stage for stage in asked.stages if stage.name not in EVERYTHING}
    kinds = ("q8_0", "q4_0")
    assert added.keys() == {
        *(f"export:gguf-{kind}:dense" for kind in kinds),
        *(f"evaluate:perplexity:dense+{kind}" for kind in kinds),
        *(f"profile:dense+{kind}" for kind in kinds),
    }
    file = added["export:gguf-q8_0:dense"]
    assert file.ref.key == keys(planned(mirror, one))["export:gguf-q8_0:dense"]
    measured = added["evaluate:perplexity:dense+q8_0"].request
    assert measured.inputs == (asked.checkpoints["dense"], file.ref)
    own = next(stage for stage in asked.stages if stage.name == "evaluate:perplexity:dense")
    assert own.ref.key == keys(planned(mirror))["evaluate:perplexity:dense"]
    assert measured.model_dump(exclude={"export"}) == own.request.model_dump(exclude={"export"})
    depths = {stage.name: depth for depth, stage in asked.outline}
    assert depths["evaluate:perplexity:dense+q8_0"] == depths["export:gguf-q8_0:dense"] + 1
    assert added["profile:dense+q8_0"].ref.key.startswith("profile-file-v1-")
    assert "measure" not in planned(mirror, one).spec.model_dump(mode="json")["exports"][0]


def test_which_evaluations_of_a_file_are_made_can_be_said(mirror: Path) -> None:
    asked = "exports=[{{format: gguf, on: [dense], measure: {{evals: {}}}}}]"
    names = {stage.name for stage in planned(mirror, asked.format("[zero_shot]")).stages}
    assert {"evaluate:zero_shot:dense+f16", "profile:dense+f16"} <= names
    assert "evaluate:perplexity:dense+f16" not in names
    with pytest.raises(SpecError, match="unknown evaluation 'zero_shoot'; did you mean 'zero_shot'"):
        planned(mirror, asked.format("[zero_shoot]"))
    twice = "exports=[{format: gguf, on: [dense], measure: {}}, {format: gguf, on: all, measure: {}}]"
    with pytest.raises(SpecError, match=r"are called 'dense\+f16'; measure each file once"):
        planned(mirror, twice)
    for wrong in ("q4_k", "[q4_k]"):
        with pytest.raises(SpecError, match=r"exports\.0\.type = .*q4_k.* should be 'f16', .*'q4_0'"):
            planned(mirror, f"exports=[{{format: gguf, type: {wrong}}}]")


def test_another_llama_cpp_is_another_profile_of_a_file(mirror: Path) -> None:
    spec = load_spec("smoke", [*SPEC, "exports=[{format: gguf, on: [dense], measure: {}}]"])
    identities = locate(spec, Sources((mirror,), None, False, home=mirror.parent / "home"))
    none, one = (build_stages(spec, identities, "cpu", runtime) for runtime in ("", "xllamacpp 1 on a"))
    assert changed(none, one) == {"profile:dense+f16"}
