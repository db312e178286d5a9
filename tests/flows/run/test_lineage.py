"""How checkpoints are made is recorded as the spec says it, and is read out of old records the same."""

from __future__ import annotations

import pytest
import yaml

from flows.run.lineage import lineage
from flows.spec.load import load_spec, parse_spec, shipped_specs
from flows.spec.run import RunSpec
from infra.results.lineage import Made
from infra.results.older_formats import made_by

MANY = """
name: many
model: {id: tiny}
calibration: {data: c4, num_samples: 8, seq_len: 64}
steps:
  - {method: shortened, layers: 2}
  - method: slimgpt
    sparsity: [0.2, 0.5]
    variants: {full: {}, short: {calibration: {num_samples: 4}, curve: uniform}}
  - {recovery: lora, data: {dataset: yahma/alpaca-cleaned}}
  - {method: magnitude, sparsity: 0.125, name: last}
"""


def many() -> RunSpec:
    return parse_spec(yaml.safe_load(MANY), source="many")


def without_calibration(made: Made) -> tuple[object, ...]:
    """Which steps read any only the methods know."""
    options = {key: value for key, value in made.options.items() if key != "calibration"}
    return made.name, made.source, made.action, made.plugin, options, made.sparsity, made.variant


#: of a method that is younger than those records
YOUNGER = {"smollm2-135m-vocabulary"}


@pytest.mark.parametrize("name", [*sorted(shipped_specs().keys() - YOUNGER), "many"])
def test_an_old_record_tells_the_same(name: str) -> None:
    spec = many() if name == "many" else load_spec(name)
    told = [without_calibration(made) for made in made_by(spec.model_dump(mode="json"))]
    assert told == [without_calibration(made) for made in lineage(spec)]
    assert [made.name for made in lineage(spec)] == list(spec.checkpoints[1:])


def test_a_step_has_the_calibration_that_it_reads() -> None:
    found = {made.name: made.options.get("calibration", {}) for made in lineage(many())}
    assert found["short-20"]["num_samples"] == 4
    assert found["full-20"]["num_samples"] == 8
    assert found["full-20+lora"] == {}


def test_a_smaller_vocabulary_is_no_share_of_the_decoder() -> None:
    made = {each.name: each for each in lineage(load_spec("smollm2-135m-vocabulary"))}["vocabulary-20"]
    assert (made.sparsity, made.of_layers, made.options["sparsity"]) == (None, False, 0.2)
    assert "calibration" not in made.options
