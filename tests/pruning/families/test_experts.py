"""Mixtures of experts: channels within experts, whole experts, statistics of the tokens that are routed to them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from infra import registry
from pruning.calibration import CalibrationSet
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.checkpoints.llama_cpp import check_family
from pruning.checkpoints.save_load import load_checkpoint, save_checkpoint
from pruning.checkpoints.surgery import mask_, shrink_
from pruning.errors import PruningError
from pruning.families import decoder_parameters, family_of, layer_cost, shapes
from pruning.families.parts import check_parts
from pruning.layerwise.streaming import prune_checkpoint
from pruning.methods import flap, shortened, slimgpt
from pruning.modeling import config_shapes
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from pruning.recovery import RecoveryInputs, lora
from pruning.training.adapters import ADAPTER_FOLDER, check_targets, merged_adapters, num_parameters
from pruning.training.options import TrainingRun
from pruning.walk.sequential import walk_layers
from tests.pruning.captured import CPU, ON_THREE_LAYERS, RECORDS, prune_copy, same_weights, windows
from tests.pruning.checkpoints.test_surgery import generate, plan_for
from tests.pruning.families.test_later_families import CONFIG, outcome, probe
from tests.tiny import EXPERT_FAMILIES, tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class Given:
    """What the stock layer's router and experts were given and gave, in the model's own forward."""

    read_TC: Tensor
    weights_TK: Tensor
    experts_TK: Tensor


@torch.no_grad()
def given(model: PreTrainedModel, index: int, ids_NL: Tensor) -> Given:
    block: Any = family_of(model).mlp(family_of(model).layers(model)[index])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = block.experts.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(ids_NL)
    handle.remove()
    ((read_TC, experts_TK, weights_TK),) = seen
    return Given(read_TC.double(), weights_TK.double(), experts_TK)


def inputs_of(model: PreTrainedModel, index: int, expert: int, seen: Given) -> tuple[Tensor, Tensor]:
    """What the expert's output linear gets of every token, (T, I), and the token's weight there, 0 for not routed."""
    module: Any = family_of(model).mlp(family_of(model).layers(model)[index]).experts
    gate, up = module.gate_up_proj[expert].detach().double().chunk(2)
    X_TI = torch.nn.functional.silu(seen.read_TC @ gate.T) * (seen.read_TC @ up.T)
    weights_T = (seen.weights_TK * (seen.experts_TK == expert)).sum(1)
    return X_TI, weights_T


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_rows_fit_and_costs_are_exact(name: str, tmp_path: Path) -> None:
    dense = tiny_model(name, layers=4)
    family, cost = family_of(dense), layer_cost(dense)
    check_parts(family, dense)
    assert family is family_of(dense.config)
    assert shapes(dense) == config_shapes(dense.config)
    assert [shape.num_experts for shape in shapes(dense)] == ([4] * 4 if name == "mixtral" else [6, 0, 6, 6])
    plan = plan_for(dense, seed=0)
    masked, shrunk = copy.deepcopy(dense), copy.deepcopy(dense)
    mask_(masked, plan)
    shrink_(shrunk, plan)
    assert any(kept.shape.num_experts < shapes(dense)[kept.layer].num_experts for kept in plan.layers)
    assert (probe(masked) - probe(dense)).abs().max() > 0.01
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    mask_(masked, plan)  # once more changes nothing
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=0)
    assert shapes(shrunk) == plan.shapes == config_shapes(shrunk.config)
    assert decoder_parameters(shrunk) == sum(map(cost.parameters, plan.shapes))
    assert layer_cost(shrunk) == cost
    save_checkpoint(shrunk, None, tmp_path, plan)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(probe(loaded), probe(shrunk))
    assert torch.equal(generate(loaded), generate(shrunk, use_cache=False))
    family.layers(dense)[2].mlp.experts.norm = torch.nn.RMSNorm(4)
    with pytest.raises(PruningError, match=rf"mlp\.experts\.norm\.weight .* the family {name} does not know"):
        check_parts(family, dense)


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_streamed_is_resident(name: str, tmp_path: Path) -> None:
    found = outcome(name)
    torch.testing.assert_close(probe(found.shrunk), probe(found.masked), atol=1e-5, rtol=1e-5)
    save_checkpoint(found.dense, None, tmp_path / "source")
    pruned = prune_checkpoint(
        tmp_path / "source", tmp_path / "out", slimgpt, windows(found.dense), CONFIG, options=CPU,
        work=tmp_path / "work",
    )  # fmt: skip
    assert pruned.plan == found.pruned.plan
    loaded = load_checkpoint(tmp_path / "out")
    assert type(loaded) is type(found.shrunk)
    assert same_weights(loaded, found.shrunk)
    names = load_file(next(iter(sorted((tmp_path / "out").glob("model-00002*"))))).keys()
    assert any(".experts.0." in each for each in names), "one expert per name, as published"
    # a pruned model is a model: it can be pruned again
    again, then = prune_copy(loaded, slimgpt.Config(sparsity=0.2, split="ffn"))
    shrink_(again, then.plan)
    whole = copy.deepcopy(found.dense)
    shrink_(whole, found.pruned.plan.compose(then.plan))
    assert shapes(again) == shapes(whole)


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_statistics_are_of_the_routed_tokens(name: str) -> None:
    """By hand: every token that the router sends to an expert, with the square of its weight, over all tokens."""
    dense = tiny_model(name)
    ids_NL = windows(dense, num_samples=12).input_ids_NL
    seen = {index: given(dense, index, ids_NL) for index, shape in enumerate(shapes(dense)) if shape.num_experts}
    offered = 0
    for sub_layer in walk_layers(ResidentDecoder(dense), ids_NL, CPU):
        if sub_layer.expert is None:
            continue
        offered += 1
        X_TI, weights_T = inputs_of(dense, sub_layer.layer, sub_layer.expert, seen[sub_layer.layer])
        H_II = (X_TI * weights_T.square()[:, None]).T @ X_TI / len(X_TI)
        hessian = sub_layer.hessian
        assert hessian is not None
        assert hessian.num_tokens == int((weights_T > 0).sum()) >= X_TI.shape[1], "else tokens are assumed"
        torch.testing.assert_close(hessian.matrix_II.double(), H_II, atol=1e-5, rtol=1e-4)
        assert sub_layer.name.endswith(f"layers.{sub_layer.layer}.mlp.experts.{sub_layer.expert}.down_proj")
        assert sub_layer.ends_layer == (sub_layer.expert == sub_layer.num_experts - 1)
    assert offered == sum(shape.num_experts for shape in shapes(dense))


def test_the_update_is_the_best_for_what_joins_the_stream() -> None:
    dense = tiny_model("mixtral", layers=1)
    calibration = windows(dense, num_samples=12)
    config = slimgpt.Config(sparsity=0.2, split="ffn", dampening_frac=1e-8)
    masked, pruned = prune_copy(dense, config, calibration)
    seen, reports = given(dense, 0, calibration.input_ids_NL), pruned.layers[1:]
    assert len(reports) == 4
    for expert, report in enumerate(reports):
        X_TI, weights_T = inputs_of(dense, 0, expert, seen)
        W_OI, V_OI = (
            model.model.layers[0].mlp.experts.down_proj[expert].detach().double() for model in (dense, masked)
        )
        kept_I = V_OI.any(0)
        assert int(kept_I.sum()) == report.kept == pruned.plan.shapes[0].intermediate_size < report.total
        weighted_TI = X_TI * weights_T[:, None]
        best_KO = torch.linalg.lstsq(weighted_TI[:, kept_I], weighted_TI @ W_OI.T).solution
        torch.testing.assert_close(V_OI[:, kept_I], best_KO.T, atol=2e-3, rtol=2e-3)
        error = (weighted_TI @ (W_OI - V_OI).T).square().sum(1).mean()
        assert report.measured_error == pytest.approx(float(error), rel=1e-3)
        assert report.num_tokens == int((weights_T > 0).sum())


def test_an_expert_without_tokens_is_ranked_by_its_weights_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    dense = tiny_model("mixtral", layers=1)
    whole = windows(dense)
    few = CalibrationSet(whole.input_ids_NL[:1, :2], whole.heldout_ids_ML[:1, :2], {})
    _, pruned = prune_copy(dense, slimgpt.Config(sparsity=0.2, split="ffn"), few)
    counts = torch.bincount(given(dense, 0, few.input_ids_NL).experts_TK.flatten(), minlength=4).tolist()
    assert 0 in counts
    for expert, (count, report) in enumerate(zip(counts, pruned.layers[1:], strict=True)):
        assert (report.num_tokens, report.assumed_tokens) == (count, 24 - count)
        if not count:
            energy_I = dense.model.layers[0].mlp.experts.down_proj[expert].detach().square().sum(0)
            kept = pruned.plan.layers[0].kept_by_expert[expert]
            assert set(kept) == set(energy_I.topk(len(kept)).indices.tolist())
    assert f"the fewest: model.layers.0.mlp.experts.{counts.index(0)}.down_proj, 0 of 24" in caplog.text


METHODS = [name for name in registry.available("pruning.methods") if name not in ("slimgpt", "vocabulary")]


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, name: str) -> None:
    dense, module = tiny_model(name), registry.load("pruning.methods", method, "method")
    options = ON_THREE_LAYERS.get(method, {}) | ({"repair": "none"} if method == "flap" else {})
    config = module.Config(sparsity=0.3, **options)
    if hasattr(module, "train"):
        with pytest.raises(PruningError, match=f"no masks for the experts of a {name} model: take slimgpt"):
            prune_copy(dense, config, method=module)
        with pytest.raises(PruningError, match="no masks for the experts"):
            module.check_model(config, shapes(dense), layer_cost(dense), family_of(dense))
        return
    masked, pruned = prune_copy(dense, config, method=module)
    shrunk = copy.deepcopy(masked)
    shrink_(shrunk, pruned.plan)
    torch.testing.assert_close(probe(shrunk), probe(masked), atol=1e-5, rtol=1e-5)
    assert pruned.achieved_sparsity == pytest.approx(1 - decoder_parameters(shrunk) / decoder_parameters(dense))
    assert abs(pruned.achieved_sparsity - 0.3) < (0.1 if method in ("shortened", "experts") else 0.05)
    if method not in ("shortened", "experts"):
        channels = [kept.kept_by_expert for kept in pruned.plan.layers if kept.shape.num_experts]
        assert any(len(set(of_layer.values())) > 1 for of_layer in channels), "each expert keeps channels of its own"


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_what_cannot_be_done_with_experts_is_said(name: str) -> None:
    dense = tiny_model(name)
    with pytest.raises(PruningError, match=f"the experts of a {name} model have none: set repair to none"):
        prune_copy(dense, flap.Config(sparsity=0.3), method=flap)
    for options, named in (({"unit": "sub_layer"}, "unit sub_layer"), ({"merge": "linear"}, "merge 'linear'")):
        with pytest.raises(PruningError, match=f"{named} is about MLPs, and a {name} model has experts"):
            prune_copy(dense, shortened.Config(layers=1, **options), method=shortened)
    with pytest.raises(PruningError, match=r"experts of a width that is a multiple of 8: set channel_multiple to 8"):
        prune_copy(dense, slimgpt.Config(sparsity=0.3, split="ffn", uniform=True))
    with pytest.raises(PruningError, match=f"GGUF files of the family {name} are not written"):
        check_family(family_of(dense))


def test_plans_of_experts_keep_as_many_channels_of_each() -> None:
    shape = LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=3, num_experts=3)
    full = PruningPlan.full([shape], 4)
    assert full.layers[0].kept_by_expert == {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2)}
    assert full.shapes == (shape,)
    assert PruningPlan.model_validate_json(full.model_dump_json()) == full
    cut = full.layers[0].model_copy(update={"kept_channels": (0, 2, 7, 8)})
    assert cut.kept_by_expert == {0: (0, 2), 2: (1, 2)}
    assert cut.shape == LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=2, num_experts=2)
    then = LayerPlan(layer=0, kept_query_heads=(0,), kept_kv_heads=(0,), kept_channels=(1, 2), expert_size=2)
    assert cut.compose(then).kept_by_expert == {0: (2,), 2: (1,)}
    for channels in ((0, 1, 3), ()):
        with pytest.raises(PruningError, match="the same number of channels of every expert that it keeps"):
            full.layers[0].model_copy(update={"kept_channels": channels}).check(shape)
    with pytest.raises(PruningError, match="3 experts of 3 channels, and its plan is for expert_size 0"):
        full.layers[0].model_copy(update={"expert_size": 0}).check(shape)
    assert "expert" not in LayerShape(num_heads=2, num_kv_heads=2, intermediate_size=3).model_dump_json()


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_adapters_on_experts_are_merged_into_them(name: str, tmp_path: Path) -> None:
    """Trained, stopped after a checkpoint and gone on with: the same weights, which save and load like any others."""
    given: dict[str, Any] = {"targets": ("q", "v", "experts"), "dropout": 0, "rank": 2, "save_steps": 1, "max_steps": 3}
    given |= {"batch_size": 2, "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0, "dtype": "float32"}
    config = lora.Config(**given)
    models = [copy.deepcopy(outcome(name).shrunk) for _ in range(2)]
    before, modules = copy.deepcopy(models[0]), [type(module) for module in models[0].modules()]

    def stop(share: float, message: str) -> None:
        if share > 0.5:
            raise KeyboardInterrupt

    def recover(model: PreTrainedModel, scratch: str, **run: Any) -> Any:
        beside = TrainingRun(tmp_path / scratch, beside=tmp_path, **run)
        return lora.recover(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, beside)

    report = recover(models[0], "whole")
    if name == "mixtral":
        with pytest.raises(KeyboardInterrupt):
            recover(models[1], "stopped", progress=stop)
        assert same_weights(models[1], before)
        assert list((tmp_path / "stopped").glob("checkpoint-*"))
        recover(models[1], "stopped")
        assert same_weights(*models)
    losses = [value for _, value in report.curves["train_loss"]]
    assert losses[-1] < losses[0]
    assert [type(module) for module in models[0].modules()] == modules
    old = before.state_dict()
    changed = {each for each, value in models[0].state_dict().items() if not torch.equal(value, old[each])}
    weights = ("q_proj.weight", "v_proj.weight", "experts.gate_up_proj", "experts.down_proj")
    assert changed == {each for each in old if each.endswith(weights)}
    save_checkpoint(models[0], None, tmp_path / "merged")
    assert torch.equal(probe(load_checkpoint(tmp_path / "merged")), probe(models[0]))
    assert "target_parameters" in (tmp_path / ADAPTER_FOLDER / "adapter_config.json").read_text()


def test_adapters_on_experts_have_neither_dropout_nor_dora() -> None:
    with pytest.raises(ValueError, match="adapters on experts know none; set dropout to 0, or leave experts out"):
        lora.Config(targets=("q", "experts"))
    with pytest.raises(ValueError, match="set dora to false, or leave experts out of targets"):
        lora.Config(targets=("experts",), dropout=0, dora=True)
    config = lora.Config(targets=("experts",), dropout=0, rank=2)
    with pytest.raises(PruningError, match="a llama model has no experts to adapt"):
        check_targets(config, family_of(tiny_model("llama")))
    model = tiny_model("mixtral")
    with merged_adapters(model, config) as adapted:
        trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
        hidden, channels = model.config.hidden_size, model.config.intermediate_size
        assert 0 < trained <= num_parameters(config, model.num_parameters(), 3, hidden, channels)


@pytest.mark.parametrize("name", EXPERT_FAMILIES)
def test_adapters_leave_experts_alone_and_say_so(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(outcome(name).shrunk)
    before = copy.deepcopy(model.state_dict())
    config = lora.Config(batch_size=2, micro_batch_size=2, max_steps=1, learning_rate=1e-2, warmup_steps=0)
    lora.recover(model, tiny_tokenizer(), RecoveryInputs(records=RECORDS), config, TrainingRun(tmp_path))
    assert f"adapters leave the experts of a {name} model as they are" in caplog.text
    changed = {each for each, value in model.state_dict().items() if not torch.equal(value, before[each])}
    linears = {f"{each}.weight" for each, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == linears - {"lm_head.weight"}
    if name == "mixtral":
        with (
            pytest.raises(PruningError, match="no weights left in this model, whose experts are not adapted"),
            merged_adapters(model, lora.Config(targets=("gate", "up"))),
        ):
            pass
