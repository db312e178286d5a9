"""Scores of heads and channels against autograd, hooks and hand computation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infra import registry
from pruning.checkpoints.decoder import ResidentDecoder
from pruning.families import family_of, shapes
from pruning.families.forward import output_name
from pruning.orders import Order, Orders
from tests.pruning.captured import CPU, outputs, recorded_inputs, windows
from tests.tiny import tiny_model

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 4


def ranked(model: PreTrainedModel, folder: Path, method: str, **options: Any) -> Orders:
    module = registry.load("pruning.methods", method, "method")
    config = module.order_config(module.Config(sparsity=0.2, **options))
    module.order(ResidentDecoder(model), config, folder, calibration=windows(model), options=CPU)
    return Orders(folder)


def of(orders: Orders, model: PreTrainedModel, layer: int, unit: Any) -> Order:
    return orders.load(output_name(family_of(model), layer, "mlp" if unit == "channel" else "attention"), unit)


def scores_by_group(order: Order) -> Tensor:
    scores = torch.empty(len(order.order), dtype=torch.float64)
    scores[list(order.order)] = torch.tensor(order.scores, dtype=torch.float64)
    return scores


def gradients(model: PreTrainedModel) -> None:
    ids_NL = windows(model).input_ids_NL
    model(ids_NL, labels=ids_NL).loss.backward()


@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "qwen2", "phi"])
def test_taylor_is_weight_times_gradient_of_what_goes_together(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    orders = ranked(model, tmp_path, "llm_pruner")
    gradients(model)
    shape = shapes(model)[1]
    linears = family_of(model).linears(family_of(model).layers(model)[1])
    taylor = {role: (each.weight * each.weight.grad).abs().double() for role, each in linears.items()}
    channels = sum(taylor[role].sum(1) for role in ("gate", "up") if role in taylor) + taylor["down"].sum(0)
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-9)
    close(scores_by_group(of(orders, model, 1, "channel")), channels.detach())
    group = shape.num_groups
    heads = taylor["q"].reshape(HEADS, HEAD_DIM, -1).sum((1, 2)) + taylor["o"].sum(0).reshape(HEADS, HEAD_DIM).sum(1)
    whole = heads.reshape(-1, group).sum(1) + sum(
        taylor[role].reshape(shape.num_kv_heads, HEAD_DIM, -1).sum((1, 2)) for role in "kv"
    )
    close(scores_by_group(of(orders, model, 1, "kv_group")), whole.detach())
    if group > 1:
        by_head = of(orders, model, 1, "query_head")
        close(scores_by_group(by_head), heads.detach())
        for round_ in range(group):  # one of every kv group before a second of any
            of_round = by_head.order[round_ * shape.num_kv_heads : (round_ + 1) * shape.num_kv_heads]
            assert {head // group for head in of_round} == set(range(shape.num_kv_heads))


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max", "prod", "first"])
def test_vectors_and_aggregations(aggregation: Any, tmp_path: Path) -> None:
    model = tiny_model("llama-mha")
    orders = ranked(model, tmp_path, "llm_pruner", level="vector", aggregation=aggregation)
    gradients(model)
    linears = family_of(model).linears(family_of(model).layers(model)[0])
    taylor = {role: (each.weight * each.weight.grad).double() for role, each in linears.items()}

    def aggregate(*parts: Tensor) -> Tensor:
        stacked = torch.stack(parts)
        return {
            "sum": stacked.sum(0),
            "mean": stacked.mean(0),
            "max": stacked.max(0).values,
            "prod": stacked.prod(0),
            "first": stacked[0],
        }[aggregation]

    channels = aggregate(taylor["gate"].sum(1).abs(), taylor["up"].sum(1).abs(), taylor["down"].sum(0).abs())
    heads = aggregate(*(taylor[role].sum(1).abs() for role in "qkv"), taylor["o"].sum(0).abs())
    heads = heads.reshape(HEADS, HEAD_DIM).sum(1)
    for unit, expected in (("channel", channels), ("kv_group", heads)):
        found = scores_by_group(of(orders, model, 0, unit))
        torch.testing.assert_close(found, expected.detach(), rtol=2e-3, atol=float(expected.max()) * 1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_magnitude(norm: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    orders = ranked(model, tmp_path, "magnitude", norm=norm)
    layer = family_of(model).layers(model)[2]
    size = {
        role: (each.weight.detach().double().abs() if norm == "l1" else each.weight.detach().double().square())
        for role, each in family_of(model).linears(layer).items()
    }
    channels = size["gate"].sum(1) + size["up"].sum(1) + size["down"].sum(0)
    torch.testing.assert_close(scores_by_group(of(orders, model, 2, "channel")), channels)
    kv = sum(size[role].reshape(KV_HEADS, -1).sum(1) for role in "kv")
    groups = kv + size["q"].reshape(KV_HEADS, -1).sum(1) + size["o"].sum(0).reshape(KV_HEADS, -1).sum(1)
    torch.testing.assert_close(scores_by_group(of(orders, model, 2, "kv_group")), groups)


@pytest.mark.parametrize("family", ["llama", "opt", "phi"])
def test_wanda_sp(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    orders = ranked(model, tmp_path, "wanda_sp")
    with torch.no_grad(), recorded_inputs(model) as seen:
        model(windows(model).input_ids_NL)
    for name, (X_TI,) in seen.items():
        W_OI = outputs(model)[name].weight.detach().double()
        columns = W_OI.square().sum(0) * X_TI.square().mean(0)
        unit = "kv_group" if len(columns) != 48 else "channel"
        expected = columns if unit == "channel" else columns.reshape(shapes(model)[0].num_kv_heads, -1).sum(1)
        torch.testing.assert_close(scores_by_group(orders.load(name, unit)), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("metric", ["WIFV", "IFV"])
def test_flap_standardises_the_variance_over_all_tokens(metric: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    orders = ranked(model, tmp_path, "flap", metric=metric)
    with torch.no_grad(), recorded_inputs(model) as seen:
        model(windows(model).input_ids_NL)
    for name, (X_TI,) in seen.items():
        W_OI = outputs(model)[name].weight.detach().double()
        columns = X_TI.var(0) * (W_OI.square().sum(0) if metric == "WIFV" else 1)
        heads = len(columns) != 48
        columns = columns.square() if heads else columns
        columns = (columns - columns.mean()) / columns.std()
        expected = columns.reshape(KV_HEADS, -1).mean(1) if heads else columns
        found = scores_by_group(orders.load(name, "kv_group" if heads else "channel"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(orders.load_mean(name).double(), X_TI.mean(0), rtol=1e-4, atol=1e-5)


def test_random_is_what_its_seed_says(tmp_path: Path) -> None:
    model = tiny_model("llama")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    one, same, other = (
        ranked(model, tmp_path / name, "random", seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert of(one, model, 0, "channel") == of(same, model, 0, "channel") != of(other, model, 0, "channel")
    assert sorted(of(one, model, 0, "channel").order) == list(range(48))
