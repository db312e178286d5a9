"""A night's matrix: which cells it has, and what is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.errors import SpecError
from flows.spec.load import load_night, load_spec, parse_night, shipped_nights, shipped_specs
from flows.spec.night import NightSpec
from flows.spec.run import RunSpec

NEWS = {"data": {"dataset": "slimline/news"}, "num_samples": 8, "seq_len": 64}
MATRIX: dict[str, Any] = {
    "models": ["slimline/tiny-random-llama"],
    "methods": {"slimgpt": {}, "equal": {"method": "slimgpt", "split": "equal"}},
    "sparsities": [0.2, 0.5],
    "recoveries": {"none": {}, "lora": {"data": {"dataset": "slimline/instructions"}}},
}


def night(matrix: dict[str, Any] | None = None, **changes: Any) -> NightSpec:
    raw = {"name": "n", "mirror": "offline", "calibration": NEWS, "matrix": MATRIX | (matrix or {})} | changes
    return parse_night(raw, source="test")


def test_cells_are_the_product_of_the_axes() -> None:
    cells = night().cells
    assert len(cells) == 8
    assert cells[1].name == "tiny-random-llama-slimgpt-20-lora"
    assert cells[1].spec.name == "n-tiny-random-llama-slimgpt-20-lora"
    assert cells[1].spec.checkpoints == ("dense", "slimgpt-20", "slimgpt-20+lora")
    assert cells[0].spec.checkpoints == ("dense", "slimgpt-20")
    last = cells[-1].spec.derivations[0].step
    assert (last.config.sparsity, last.config.split) == (0.5, "equal")


def test_the_matrix_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    validate, names = RunSpec.model_validate, []
    monkeypatch.setattr(RunSpec, "model_validate", lambda raw: (names.append(raw["name"]), validate(raw))[1])
    asked = night()
    assert asked.cells[0].spec is asked.cells[0].spec
    assert len(names) == len(set(names)) == 8


def test_cells_start_where_the_night_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is noted after the cells were made."""
    monkeypatch.chdir(tmp_path)
    local = night({"models": {"own": {"id": "./model"}}}).model_dump(mode="json")
    Path("night.yaml").write_text(yaml.safe_dump(local), encoding="utf-8")
    assert {cell.spec.folder for cell in load_night("night.yaml").cells} == {str(tmp_path)}


def test_excluded_combinations_are_no_cells() -> None:
    cells = night({"exclude": [{"method": "equal", "recovery": "lora"}, {"sparsity": 0.5}]}).cells
    assert [cell.name.removeprefix("tiny-random-llama-") for cell in cells] == [
        "slimgpt-20-none",
        "slimgpt-20-lora",
        "equal-20-none",
    ]


def test_plain_names_are_enough() -> None:
    short = night({"methods": ["slimgpt"], "recoveries": ["none"], "sparsities": [0.25]})
    assert [cell.name for cell in short.cells] == ["tiny-random-llama-slimgpt-25-none"]


def test_a_night_survives_the_trip_through_plain_data() -> None:
    whole = night(
        gates=[{"metric": "perplexity/*", "at_most": 40}],
        evals=[{"suite": "perplexity", "dataset": "slimline/wikipedia", "config": None}],
    )
    assert parse_night(whole.model_dump(mode="json"), source="test") == whole


@pytest.mark.parametrize("name", shipped_nights())
def test_shipped_nights_load(name: str) -> None:
    assert load_night(name).cells


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"matrix": MATRIX | {"methods": ["slimgtp"]}}, "did you mean 'slimgpt'"),
        ({"matrix": MATRIX | {"methods": {"a": {"method": "slimgpt", "splitt": 1}}}}, "unknown key 'splitt'"),
        ({"matrix": MATRIX | {"sparsities": [0.2, 0.2]}}, "0.2 is there twice"),
        ({"matrix": MATRIX | {"sparsities": [1.5]}}, "sparsity = 1.5"),
        ({"matrix": MATRIX | {"models": ["a/b", "c/b"]}}, "two entries are called 'b'"),
        ({"matrix": MATRIX | {"recoveries": {"none": {"recovery": "lora"}}}}, "means no recovery"),
        ({"matrix": MATRIX | {"exclude": [{"methd": "equal"}]}}, "did you mean 'method'"),
        ({"matrix": MATRIX | {"exclude": [{"method": "eqal"}]}}, "did you mean 'equal'"),
        ({"matrix": MATRIX | {"exclude": [{"model": "tiny-random-llama"}]}}, "leaves no cell"),
        ({"gates": [{"metric": "perplexity/*"}]}, "demands nothing"),
        ({"gates": [{"metric": "perplexity/*", "at_mots": 3}]}, "did you mean 'at_most'"),
        ({"matrx": {}}, "did you mean 'matrix'"),
        ({"alpha": 1.5}, "alpha = 1.5"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecError) as refused:
        night(**changes)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_night_is_no_run_and_a_run_no_night(tmp_path: Path) -> None:
    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump(night().model_dump(mode="json")), encoding="utf-8")
    assert load_night(str(path)).name == "n"
    with pytest.raises(SpecError, match="slimline nightly"):
        load_spec(str(path))
    with pytest.raises(SpecError, match="no `matrix`, so it is no night"):
        load_night(str(shipped_specs()["demo"]))


def test_a_recovery_may_be_a_list_of_steps() -> None:
    both = [{"recovery": "cpt", "data": "redpajama"}, {"recovery": "lora", "data": "alpaca"}]
    asked = night({"methods": ["slimgpt"], "sparsities": [0.2], "recoveries": {"none": {}, "both": both}})
    assert [cell.spec.checkpoints[1:] for cell in asked.cells] == [
        ("slimgpt-20",),
        ("slimgpt-20", "slimgpt-20+cpt", "slimgpt-20+cpt+lora"),
    ]
    assert parse_night(asked.model_dump(mode="json"), source="again") == asked
    for entry, problem in (
        ([], "both: an empty list trains nothing"),
        (["lora"], "both: 'lora' is no step; write a mapping with the key `recovery`"),
        ([{"recovery": "lara"}], "unknown recovery 'lara'; did you mean 'lora'"),
    ):
        with pytest.raises(SpecError, match=problem):
            night({"recoveries": {"both": entry}})
