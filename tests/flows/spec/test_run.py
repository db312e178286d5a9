"""What a spec may say, and the one sentence that answers what it may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.commands.doctor import security_warnings
from flows.errors import SpecError
from flows.spec.load import dump_spec, load_night, load_spec, parse_spec, shipped_specs
from infra.settings import Settings


def refused(*overrides: str, spec: str = "smoke") -> str:
    """The sentence with which the spec is refused."""
    with pytest.raises(SpecError) as caught:
        load_spec(spec, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, content: Any) -> str:
    path = folder / "spec.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", shipped_specs())
def test_a_shipped_spec_survives_yaml(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert spec.description
    assert parse_spec(yaml.safe_load(dump_spec(spec)), source="dump") == spec


def test_the_dump_writes_every_default_out() -> None:
    dumped = yaml.safe_load(dump_spec(load_spec("smoke")))
    assert dumped["steps"][0]["propagate_error"] is True
    assert dumped["steps"][1]["rank"] == 8
    assert dumped["evals"][1]["num_fewshot"] == 0
    assert dumped["model"]["dtype"] == "auto"


@pytest.mark.parametrize(
    "override, where, near",
    [
        ("stepz=1", "'stepz'", "'steps'"),
        ("model.idd=x", "'idd' in model", "'id'"),
        ("calibration.num_sampels=3", "'num_sampels' in calibration", "'num_samples'"),
        ("calibration.data.tmplate=alpaca", "'tmplate' in calibration.data", "'template'"),
        ("calibration.data.datset=x", "'datset' in calibration.data", "'dataset'"),
        ("steps.0.sparsty=0.3", "steps.0: slimgpt: unknown key 'sparsty'", "'sparsity'"),
        ("steps.0.nam=x", "steps.0: slimgpt: unknown key 'nam'", "'name'"),
        ("steps.1.rnak=4", "steps.1: lora: unknown key 'rnak'", "'rank'"),
        ("steps.1.data.datset=x", "'datset' in data", "'dataset'"),
        ("evals.0.windoes=[3]", "evals.0: perplexity: unknown key 'windoes'", "'windows'"),
        ("evals.1.onn=all", "evals.1: zero_shot: unknown key 'onn'", "'on'"),
        ("profile.sttings={}", "'sttings' in profile", "'settings'"),
        ("profile.settings.prompt_length=3", "'prompt_length' in profile.settings", "'prompt_len'"),
        ("profile.prompt_length=3", "'prompt_length' in profile.settings", "'prompt_len'"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(override: str, where: str, near: str) -> None:
    message = refused(override)
    assert "unknown key" in message
    assert where in message
    assert f"did you mean {near}?" in message


@pytest.mark.parametrize(
    "override, near, available",
    [
        ("steps.0.method=slimgtp", "unknown method 'slimgtp'; did you mean 'slimgpt'?", "slimgpt"),
        ("steps.1.recovery=Lora-", "unknown recovery 'Lora-'; did you mean 'lora'?", "lora"),
        ("evals.0.suite=perplexitty", "unknown suite 'perplexitty'; did you mean 'perplexity'?", "zero_shot"),
    ],
)
def test_an_unknown_plugin_is_named_with_the_nearest_one(override: str, near: str, available: str) -> None:
    message = refused(override)
    assert near in message
    assert available in message.partition("available: ")[2]


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.1", "abc", "null", ".nan", ".inf", "{}"])
def test_sparsity_lies_between_zero_and_one(value: str) -> None:
    message = refused(f"steps.0.sparsity={value}")
    assert message.startswith("smoke: steps.0: slimgpt: sparsity = ")
    assert repr(yaml.safe_load(value)) in message


@pytest.mark.parametrize(
    "step",
    [
        "{sparsity: 0.2}",
        "slimgpt",
        "{method: slimgpt, recovery: lora, sparsity: 0.2}",
        "{method: slimgpt, recovery: x}",
    ],
)
def test_a_step_prunes_or_recovers(step: str) -> None:
    message = refused(f"steps.0={step}")
    assert message == "smoke: steps.0: a step names either a `method` (to prune) or a `recovery` (to train)"


@pytest.mark.parametrize("value", ["3", "null", "[slimgpt]"])
def test_the_name_of_a_plugin_is_a_word(value: str) -> None:
    message = refused(f"steps.0.method={value}")
    assert "steps.0" in message
    assert f"method = {yaml.safe_load(value)!r}" in message


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("steps=[{method: slimgpt, sparsity: 0.2}, {method: slimgpt, sparsity: 0.2}]", "two checkpoints are called"),
        (
            "steps=[{method: slimgpt, sparsity: 0.2}, {method: vocabulary, sparsity: 0.2}, {recovery: distill}]",
            "distill learns from the dense model, and vocabulary-20 has the smaller vocabulary of vocabulary-20, which "
            "was not made of the dense model: put the step vocabulary first, or after distill",
        ),
        (
            "steps=[{method: vocabulary, sparsity: 0.2}, {recovery: distill, teacher: a/b}]",
            "distill names the teacher a/b, and vocabulary-20 has the smaller vocabulary of vocabulary-20, which no",
        ),
        (
            "steps=[{method: vocabulary, sparsity: 0.2}]\nevals=[{suite: agreement}]",
            "agreement compares vocabulary-20 with the dense model token by token, and its vocabulary is a smaller one",
        ),
        ("steps.0.name=dense", "two checkpoints are called 'dense'"),
        ("evals.1={suite: perplexity}", "two evaluations are called 'perplexity'; give one of them a `name`"),
        ("evals.1.on=[dens]", "on: unknown checkpoint 'dens'; did you mean 'dense'?; this run has: dense, slimgpt-20,"),
        ("profile.on=[nothing]", "on: unknown checkpoint 'nothing'"),
        ("evals.1.on=nothing", "on: unknown checkpoint 'nothing'"),
        ("evals.1.on=[3]", "evals.1.on: [3] names no checkpoints"),
        ("calibration=null", "steps prune but there is no `calibration`"),
        ("model=null", "model = None: input should be a mapping"),
        ("evals={}", "evals = {}: input should be a list"),
        ("mirror=3", "mirror = 3: input should be a valid string"),
        ("model.dtype=float23", "model.dtype = 'float23': input should be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("calibration.num_samples=0", "calibration.num_samples = 0: input should be greater than 0"),
        ("calibration.data=c44", "calibration.data: unknown calibration set 'c44'; did you mean 'c4'?; available:"),
        ("calibration.data=3", "calibration.data = 3: input should be a mapping"),
        ("calibration.data.template=chat", "calibration.data.template: unknown template 'chat'; available: alpaca"),
        ("steps.0.name=two words", "steps.0.name = 'two words'"),
        ("steps.0={method: slimgpt}", "steps.0: slimgpt: sparsity is missing"),
        ("steps.1.batch_size=3", "batch_size 3 is not a multiple of micro_batch_size 4"),
        ("name=null", "name = None: input should be a valid string"),
        (
            "profile.settings.new_tokens=0",
            "profile.settings.new_tokens.0 = 0: input should be greater than",
        ),
        ("profile.batch_size=[8, 8]", "profile.settings.batch_size: 8 is there twice"),
        ("profile.runs=3", "runs stands both beside and under `settings`; leave one of them out"),
        (
            "profile.preset=slimgpt_table",
            "profile.settings: unknown preset 'slimgpt_table'; did you mean 'slimgpt_table4'? available:",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(override: str, sentence: str) -> None:
    assert sentence in refused(*override.split("\n"))


def test_two_smaller_vocabularies_in_a_row_are_still_the_dense_model_for_its_pupils() -> None:
    steps = "{method: vocabulary, sparsity: 0.2}, {method: vocabulary, sparsity: 0.1}, {recovery: distill}"
    spec = load_spec("smoke", [f"steps=[{steps}]", "calibration=null"])
    assert [spec.tokenizer_of(name) for name in spec.checkpoints] == ["dense", "vocabulary-20", *["vocabulary-10"] * 2]


def test_a_recovery_alone_needs_no_calibration() -> None:
    spec = load_spec("smoke", ["steps=[{recovery: lora}]", "calibration=null"])
    assert spec.checkpoints == ("dense", "dense+lora")


def test_one_checkpoint_may_be_named_without_a_list() -> None:
    assert load_spec("smoke", ["evals.0.on=dense"]).evals[0].on == ("dense",)
    assert load_spec("smoke", ["evals.0.on=all"]).evals[0].on == "all"


def test_checkpoints_are_named_after_their_steps() -> None:
    steps = "steps=[{method: slimgpt, sparsity: 0.125}, {recovery: lora}, {recovery: lora, name: again}]"
    assert load_spec("smoke", [steps]).checkpoints == ("dense", "slimgpt-12.5", "slimgpt-12.5+lora", "again")


def test_set_reaches_every_depth() -> None:
    spec = load_spec(
        "smoke",
        [
            "name=other",
            "model.dtype=bfloat16",
            "calibration.data.dataset=slimline/wikipedia",
            "steps.1.data.split=train",
            "evals.0.windows=[32, 64]",
            "profile=null",
            "description=a=b",
            "calibration.join=' '",
        ],
    )
    assert (spec.name, spec.model.dtype, spec.profile, spec.description) == ("other", "bfloat16", None, "a=b")
    assert spec.calibration is not None
    assert (spec.calibration.data.dataset, spec.calibration.join) == ("slimline/wikipedia", " ")
    assert spec.evals[0].config.windows == (32, 64)


@pytest.mark.parametrize(
    ("preset", "dataset", "told"),
    [
        ("c4", "allenai/c4", {"data_files": "en/c4-train.00000-of-01024.json.gz", "template": None}),
        ("alpaca", "yahma/alpaca-cleaned", {"data_files": None, "rows": "documents"}),
        ("wikitext2", "Salesforce/wikitext", {"config": "wikitext-2-raw-v1", "split": "train", "rows": "lines"}),
    ],
)
def test_a_calibration_preset_is_its_full_values(preset: str, dataset: str, told: dict[str, Any]) -> None:
    spec = load_spec("smoke", [f"calibration.data={preset}"])
    written_out = yaml.safe_load(dump_spec(spec))["calibration"]["data"]
    assert written_out["dataset"] == dataset
    assert told.items() <= written_out.items()
    assert parse_spec(yaml.safe_load(dump_spec(spec)), source="dump") == spec


def test_the_first_shard_of_c4_by_its_short_name_is_the_same_as_in_full() -> None:
    assert load_spec("llama-7b-slimgpt", ["calibration.data=c4"]) == load_spec("llama-7b-slimgpt")


def test_set_makes_the_mappings_on_its_way(tmp_path: Path) -> None:
    path = written(tmp_path, {"name": "bare", "model": {"id": "a/b"}})
    spec = load_spec(path, ["profile.settings.runs=3", "calibration.data.dataset=a/c"])
    assert spec.profile is not None
    assert spec.profile.settings.runs == 3


def test_options_of_a_profile_may_stand_beside_on(tmp_path: Path) -> None:
    bare = {"name": "bare", "model": {"id": "a/b"}}
    asked = {"on": ["dense"], "preset": "shortened_llama", "batch_size": [1, 2], "settings": {"runs": 3}}
    spec = load_spec(written(tmp_path, bare | {"profile": asked}))
    assert spec.profile is not None
    settings = spec.profile.settings
    assert (settings.batch_size, settings.new_tokens, settings.runs, settings.warmup) == ((1, 2), (128, 512), 3, 10)
    dumped = yaml.safe_load(dump_spec(spec))["profile"]
    assert dumped["settings"]["batch_size"] == [1, 2]
    assert "preset" not in dumped["settings"]
    assert parse_spec(yaml.safe_load(dump_spec(spec)), source="dump") == spec


def test_the_last_set_wins() -> None:
    assert load_spec("smoke", ["steps.0.sparsity=0.3", "steps.0.sparsity=0.4"]).steps[0].config.sparsity == 0.4


@pytest.mark.parametrize("override", ["foo", "=3", "a..b=1", ".a=1", "a.=1", ""])
def test_set_has_a_form(override: str) -> None:
    assert "is not of the form a.b.c=value" in refused(override)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("steps.7.sparsity=1", "'7' is not an entry of a list of 2; count from 0"),
        ("steps.x.sparsity=1", "'x' is not an entry of a list of 2"),
        ("steps.-1.sparsity=1", "'-1' is not an entry of a list of 2"),
        ("steps.2={}", "'2' is not an entry of a list of 2"),
        ("steps.0.sparsity.x=1", "there is nothing under 'x', its parent is a plain value"),
        ("steps.0.sparsity={a: ]", "the value is not valid YAML"),
        ("steps.0.sparsity=!!int x", "the value is not valid YAML"),
        ("steps.0.sparsity=!!float ''", "the value is not valid YAML"),
        ("steps.0.sparsity=!!timestamp x", "the value is not valid YAML"),
        (f"steps.0.sparsity={'9' * 5000}", "the value is not valid YAML"),
        (f"steps.0.sparsity={'[' * 3000}{']' * 3000}", "in more than 100 levels of brackets"),
        ("steps.0.sparsity=&a [*a]", "an anchor stands for something that it lies in"),
        (
            "evals=[&a [1,1,1,1,1,1,1,1], &b [*a,*a,*a,*a,*a,*a,*a,*a], &c [*b,*b,*b,*b,*b,*b,*b,*b],"
            " &d [*c,*c,*c,*c,*c,*c,*c,*c], &e [*d,*d,*d,*d,*d,*d,*d,*d], &f [*e,*e,*e,*e,*e,*e,*e,*e],"
            " [*f,*f,*f,*f,*f,*f,*f,*f]]",
            "its anchors stand for millions of values",
        ),
    ],
)
def test_set_into_nowhere_is_refused(override: str, sentence: str) -> None:
    message = refused(override)
    assert repr(override) in message
    assert sentence in message


def test_a_missing_file_is_named_with_the_nearest_spec(tmp_path: Path) -> None:
    assert "there is no spec file 'smokee'; did you mean 'smoke'?" in refused(spec="smokee")
    assert "shipped specs: demo, " in refused(spec=str(tmp_path / "nothing.yaml"))


def test_a_folder_is_no_spec(tmp_path: Path) -> None:
    assert "there is no spec file" in refused(spec=str(tmp_path))


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("name: x\nmodel: {id: a\nsteps: [", "(line 3) is not valid YAML"),
        ("name: x\n\tmodel: y", "(line 2) is not valid YAML"),
        ("", "holds no mapping"),
        ("- a\n- b", "holds no mapping"),
        ("just words", "holds no mapping"),
        ("name: x", "model is missing"),
        ("name: x\nmodel: {}", "model.id is missing"),
        ("name: x\nmodel: {id: a}\n1: 2", "keys"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(content: str, sentence: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    message = refused(spec=path)
    assert path in message
    assert sentence in message


TWICE = "name: x\nmodel: {id: a/b}\nsteps: []\nevals: []\nsteps: [{recovery: lora}]\n"


def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path, TWICE)
    sentence = f"{path} (line 5) is not valid YAML: the key 'steps' is there twice, in line 3 and in line 5; take one"
    assert sentence in refused(spec=path)
    with pytest.raises(SpecError, match=re.escape(sentence)):
        load_night(path)
    with pytest.raises(SpecError, match=re.escape(sentence)):
        list(security_warnings(Settings(home=tmp_path), [path]))
    message = refused("steps.0={recovery: lora, rank: 4, rank: 8}")
    assert "the value is not valid YAML: the key 'rank' is there twice, in line 1" in message


def test_numbers_are_what_they_look_like(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 as eight and 1e-1 as a word."""
    path = written(
        tmp_path,
        "name: 2024-01-01\nmodel: {id: a/b, revision: 0123456}\n"
        "calibration: {data: c4, num_samples: 010, seed: 0123}\nsteps: [{method: slimgpt, sparsity: [1e-1, 2e-1]}]\n",
    )
    spec = load_spec(path)
    assert (spec.name, spec.model.revision) == ("2024-01-01", "0123456")
    assert spec.calibration is not None
    assert (spec.calibration.num_samples, spec.calibration.seed) == (10, 123)
    assert [made.name for made in spec.derivations] == ["slimgpt-10", "slimgpt-20"]


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert f"{path} cannot be read" in refused(spec=str(path))


def test_specs_are_frozen() -> None:
    spec = load_spec("smoke")
    with pytest.raises(ValueError, match="frozen"):
        spec.name = "other"
    with pytest.raises(ValueError, match="frozen"):
        spec.steps[0].config.sparsity = 0.5


def test_on_is_a_key_and_no_boolean(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `on` as true."""
    (tmp_path / "own.yaml").write_text(
        "name: own\nmodel: {id: a/b}\nevals:\n  - {suite: perplexity, on: dense, keep_last_partial: yes}\n"
        "profile: {on: [dense]}\n"
    )
    spec = load_spec(str(tmp_path / "own.yaml"), ["evals.0.name=wiki", "profile={on: all}"])
    assert (spec.evals[0].on, spec.evals[0].config.keep_last_partial) == (("dense",), True)
    assert spec.profile is not None
    assert spec.profile.on == "all"
    assert parse_spec(yaml.safe_load(dump_spec(spec)), source="dump") == spec


@pytest.mark.parametrize(
    "override, words",
    [
        ("calibration.num_samples=true", "num_samples: true is no number"),
        ("calibration.num_samples=2147483648", "less than or equal to 2147483647"),
        ("calibration.seq_len=1", "greater than or equal to 2"),
        (f"calibration.seed={2**63}", f"less than or equal to {2**63 - 1}"),
        ("steps.0.dampening_frac=.inf", "dampening_frac = inf: input should be less than"),
        ("steps.0.dampening_frac=1.0e+308", "dampening_frac = 1e+308: input should be less than or equal to 1000000"),
        ("steps.0.end_points=[.nan, 0.2]", "end_points.0 = nan: input should be a finite number"),
        ("steps.0.protect_first=-1", "protect_first = -1"),
        ("steps.1.learning_rate=.inf", "learning_rate = inf: input should be a finite number"),
        ("steps.1.learning_rate=.nan", "learning_rate = nan"),
        ("steps.1.alpha=.inf", "alpha = inf: input should be a finite number"),
        ("steps.1.epochs=1.0e+30", "epochs = 1e+30"),
        ("steps.1.weight_decay=.inf", "weight_decay = inf"),
        ("steps.1.rank=true", "rank: true is no number"),
        (f"steps.1.seed={2**32}", "seed = 4294967296"),
        (f"steps.1.batch_size={10**30}", "batch_size = 1"),
        ("evals.0.windows=[1]", "evals.0: perplexity: windows.0 = 1: input should be greater than or equal to 2"),
        ("evals.0.windows=[true]", "evals.0: perplexity: windows.0: true is no number"),
        ("evals.0.max_windows=0", "max_windows = 0"),
        (f"evals.0.window_seed={2**64}", "window_seed = 18446744073709551616"),
        ("evals.1.limit=0", "limit = 0"),
        ("evals.1.num_fewshot=-1", "num_fewshot = -1"),
        ("profile.settings.ratio_seconds=.inf", "ratio_seconds = inf"),
        ("profile.settings.ratio_precision=0", "ratio_precision = 0"),
        ("profile.settings.batch_size=[true]", "batch_size.0: true is no number"),
        ("name=a b", "name = 'a b': a name is made of letters, digits, '.', '_' and '-'"),
    ],
)
def test_numbers_and_names_that_nothing_can_be_done_with(override: str, words: str) -> None:
    assert words in refused(override)
