"""The contract of every method in pruning/methods with every family: a new file is tested the day it appears."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from infra import registry
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.save_load import load_checkpoint, load_plan, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.layerwise.capture import capture_statistics
from pruning.layerwise.streaming import prune_checkpoint
from pruning.walk.options import WalkOptions
from pruning.walk.state import Pruned
from tests.pruning.captured import CPU, ON_THREE_LAYERS, in_bfloat16, logits, outputs, prune_copy, same_weights, windows
from tests.tiny import EXPERT_FAMILIES, FAMILIES, ROPE_TYPES, random_ids, rope_model, tiny_model

pytestmark = pytest.mark.slow  # not in `make test-fast`

EVERY_METHOD = registry.available("pruning.methods")
#: those that take something from layers; what makes the vocabulary smaller is in tests/pruning/vocabulary
METHODS = [
    method for method in EVERY_METHOD if not hasattr(registry.load("pruning.methods", method, "method"), "rebuild")
]
SPARSITY = 0.35
#: methods that leave all layers equally wide unless they are asked for something else
EVEN = ("experts", "magnitude", "random", "shortened", "wanda_sp")
#: what has experts takes few of them; what removes experts takes nothing else
CASES = [
    *product([method for method in METHODS if method != "experts"], FAMILIES),
    *product(("slimgpt", "experts"), EXPERT_FAMILIES),
]
FAMILY_OF = {"experts": "mixtral"}
#: methods that prune layer by layer, from checkpoint to checkpoint; the others train while they prune
WALKING = [method for method in METHODS if not hasattr(registry.load("pruning.methods", method, "method"), "train")]
#: without those that would train all families once more: that they train in every family is said by the other tests
ONCE_MORE = [(method, family) for method, family in CASES if method in WALKING or family in ("llama", "phi")]


def load(method: str) -> ModuleType:
    return registry.load("pruning.methods", method, "method")


def run(
    method: str, model: PreTrainedModel, calibration: CalibrationSet, folder: Path, options: WalkOptions = CPU
) -> tuple[PreTrainedModel, Pruned]:
    """A masked copy and the outcome; that the model itself stays as it was is checked on the way."""
    module = load(method)
    config = module.Config(sparsity=SPARSITY, **ON_THREE_LAYERS.get(method, {}))
    statistics = None
    if module.needs_statistics(config):
        statistics = folder / "statistics"
        statistics.mkdir()
        capture_statistics(ResidentDecoder(model), calibration, statistics, options)
    masked, pruned = prune_copy(model, config, calibration, method=module, statistics=statistics, options=options)
    assert isinstance(pruned, Pruned)
    return masked, pruned


@dataclass(frozen=True)
class Outcome:
    """One method on one family: computed once, read by all contract tests."""

    dense: PreTrainedModel
    masked: PreTrainedModel
    shrunk: PreTrainedModel
    pruned: Pruned
    calibration: CalibrationSet


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def outcome(method: str, family: str) -> Outcome:
        dense = tiny_model(family)
        calibration = windows(dense)
        masked, pruned = run(method, dense, calibration, tmp_path_factory.mktemp(method))
        shrunk = copy.deepcopy(masked)
        shrink_(shrunk, pruned.plan)
        return Outcome(dense, masked, shrunk, pruned, calibration)

    return outcome


def probe(model: PreTrainedModel) -> Tensor:
    return logits(model, random_ids(model, 2, 14, seed=3))


@pytest.mark.parametrize(("method", "family"), CASES)
def test_asked_sparsity_is_met(method: str, family: str, outcomes: Any) -> None:
    result: Outcome = outcomes(method, family)
    before, after = decoder_parameters(result.dense), decoder_parameters(result.shrunk)
    assert result.pruned.achieved_sparsity == pytest.approx(1 - after / before)
    cost, shape = layer_cost(result.dense), shapes(result.dense)[0]
    if result.pruned.plan.dropped_layers:
        unit = cost.parameters(shape)
    elif method == "experts":  # one of every layer
        unit = sum(cost.per_channel * each.intermediate_size + cost.per_expert for each in shapes(result.dense))
    else:
        group = cost.per_kv_head + shape.num_groups * cost.per_query_head
        unit = max(group, *map(cost.channel_parameters, shapes(result.dense)))
    assert abs(result.pruned.achieved_sparsity - SPARSITY) <= unit / before


@pytest.mark.parametrize(("method", "family"), CASES)
def test_masked_equals_shrunk(method: str, family: str, outcomes: Any) -> None:
    result: Outcome = outcomes(method, family)
    assert shapes(result.masked) == shapes(result.dense) == result.pruned.plan.source
    assert shapes(result.shrunk) == result.pruned.plan.shapes
    assert (probe(result.dense) - probe(result.masked)).abs().max() > 1e-3
    torch.testing.assert_close(probe(result.shrunk), probe(result.masked), atol=1e-5, rtol=1e-5)
    # the method has masked already: surgery's own mask finds nothing that counts
    again = copy.deepcopy(result.masked)
    mask_(again, result.pruned.plan)
    torch.testing.assert_close(probe(again), probe(result.masked), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_save_load_equal_logits(method: str, family: str, outcomes: Any, tmp_path: Path) -> None:
    result: Outcome = outcomes(method, family)
    save_checkpoint(result.shrunk, None, tmp_path, result.pruned.plan)
    assert load_plan(tmp_path) == result.pruned.plan
    assert torch.equal(probe(load_checkpoint(tmp_path)), probe(result.shrunk))


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize(("method", "family"), [("slimgpt", "llama"), ("slimgpt", "phi"), ("shortened", "llama")])
def test_every_type_of_rotary_positions(method: str, family: str, rope_type: str, tmp_path: Path) -> None:
    """Some types compute their tables anew while the model runs: the checkpoint must know what they need."""
    dense = rope_model(family, rope_type)
    masked, pruned = run(method, dense, windows(dense), tmp_path)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    assert len(set(pruned.plan.shapes)) > 1 or method in EVEN
    save_checkpoint(shrunk, None, tmp_path / "saved", pruned.plan)
    # longer than anything the models have seen: dynamic tables remember the longest
    ids = random_ids(dense, 2, 26, seed=3)
    expected = logits(masked, ids)
    torch.testing.assert_close(logits(shrunk, ids), expected, atol=1e-5, rtol=1e-5)
    loaded = load_checkpoint(tmp_path / "saved")
    assert torch.equal(logits(loaded, ids), logits(shrunk, ids))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert loaded.generate(ids[:, :14], **options).shape == (2, 18)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_generating_with_cache_equals_without(method: str, family: str, outcomes: Any) -> None:
    model = outcomes(method, family).shrunk
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    ids = random_ids(model, 2, 7)
    with_cache, without = (model.generate(ids, use_cache=use_cache, **options) for use_cache in (True, False))
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, without)


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", WALKING)
def test_streamed_and_killed_and_resumed(method: str, outcomes: Any, tmp_path: Path) -> None:
    result: Outcome = outcomes(method, FAMILY_OF.get(method, "llama"))
    save_checkpoint(result.dense, None, tmp_path / "source")
    module = load(method)
    config = module.Config(sparsity=SPARSITY, **ON_THREE_LAYERS.get(method, {}))
    statistics = tmp_path / "statistics" if module.needs_statistics(config) else None

    def prune(work: str, progress: Any = lambda share, message: None) -> Pruned:
        return prune_checkpoint(
            tmp_path / "source", tmp_path / f"of-{work}", module, result.calibration, config,
            statistics=statistics, options=CPU, work=tmp_path / work, progress=progress,
        )  # fmt: skip

    def killed(share: float, message: str) -> None:
        if len(list((tmp_path / "killed").rglob("layer-*.json"))) == 2:
            raise Killed

    whole = prune("whole")
    assert whole.plan == result.pruned.plan
    loaded = load_checkpoint(tmp_path / "of-whole")
    torch.testing.assert_close(probe(loaded), probe(result.shrunk), atol=1e-5, rtol=1e-5)
    with pytest.raises(Killed):
        prune("killed", killed)
    assert not (tmp_path / "of-killed").exists()
    assert prune("killed").plan == whole.plan
    assert same_weights(load_checkpoint(tmp_path / "of-killed"), loaded)


@pytest.mark.parametrize(("method", "family"), ONCE_MORE)
def test_same_calibration_same_plan_wherever_activations_lie(
    method: str, family: str, outcomes: Any, tmp_path: Path
) -> None:
    result: Outcome = outcomes(method, family)
    torch.manual_seed(12345)  # what the world did before does not matter
    in_files = replace(CPU, activation_budget_bytes=0)
    again, pruned = run(method, result.dense, result.calibration, tmp_path, in_files)
    assert pruned.plan == result.pruned.plan
    assert same_weights(again, result.masked)


@pytest.mark.parametrize(
    ("method", "family"), [case for case in CASES if case[0] == "slimgpt" or case[1] in ("llama", "phi", "mixtral")]
)
def test_a_model_in_bfloat16_stays_in_it(method: str, family: str, tmp_path: Path) -> None:
    dense = in_bfloat16(tiny_model(family))
    masked, pruned = run(method, dense, windows(dense), tmp_path)
    assert {parameter.dtype for parameter in masked.parameters()} == {torch.bfloat16}
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=0.05, rtol=0.05)
    save_checkpoint(shrunk, None, tmp_path / "saved", pruned.plan)
    assert torch.equal(probe(load_checkpoint(tmp_path / "saved")), probe(shrunk))


@pytest.mark.parametrize(("method", "family"), CASES)
def test_inputs_are_untouched(method: str, family: str, outcomes: Any) -> None:
    result: Outcome = outcomes(method, family)
    fresh = windows(result.dense)
    assert torch.equal(result.calibration.input_ids_NL, fresh.input_ids_NL)
    assert torch.equal(result.calibration.heldout_ids_ML, fresh.heldout_ids_ML)
    assert result.calibration.source == fresh.source
    # nothing changes but the columns that the output linears read, and their biases: what else goes is cut later;
    # adapters are merged into all linears of the layers
    dense = result.dense.state_dict()
    masked = result.masked.state_dict()
    changed = {name for name in masked if name not in dense or not torch.equal(masked[name], dense[name])}
    assert changed
    allowed = {f"{name}.{part}" for name in outputs(result.dense) for part in ("weight", "bias")}
    allowed |= {name for name in dense if name.endswith("experts.down_proj")}
    if method not in WALKING:
        family_, layers = family_of(result.dense), family_of(result.dense).layers(result.dense)
        linears = {id(linear) for layer in layers for linear in family_.linears(layer).values()}
        allowed = {f"{name}.weight" for name, module in result.dense.named_modules() if id(module) in linears}
    assert changed <= allowed
    assert not result.masked.training
    assert all(parameter.grad is None for parameter in result.masked.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_layers_reports_and_outcome_survive_json(method: str, outcomes: Any) -> None:
    pruned: Pruned = outcomes(method, FAMILY_OF.get(method, "llama")).pruned
    assert type(pruned).model_validate_json(pruned.model_dump_json()) == pruned


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_config_is_strict(method: str) -> None:
    config_class = load(method).Config
    config = config_class(sparsity=SPARSITY)
    with pytest.raises(ValidationError):
        config_class(sparsity=SPARSITY, sparsty=0.1)
    with pytest.raises(ValidationError):
        config.sparsity = 0.5
    for wrong in (0.0, 1.0, -0.1):
        with pytest.raises(ValidationError):
            config_class(sparsity=wrong)
    assert config_class.model_validate(config.model_dump(mode="json")) == config
    assert isinstance(load(method).VERSION, int)


def test_importing_the_methods_needs_no_torch() -> None:
    imports = "; ".join(f"import pruning.methods.{method}" for method in EVERY_METHOD)
    heavy = "{'torch', 'transformers', 'datasets', 'safetensors'} & set(sys.modules)"
    code = f"import sys; {imports}; found = {heavy}; sys.exit(str(found) if found else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
