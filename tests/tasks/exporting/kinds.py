"""Checkpoints of every kind that pruning leaves, of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pruning.checkpoints.save_load import save_checkpoint
from pruning.checkpoints.surgery import shrink_
from pruning.families import family_of, shapes
from pruning.plan import LayerPlan, LayerShape, PruningPlan
from tests.tiny import random_plan, tiny_model, tiny_tokenizer

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
Source = tuple[LayerShape, ...]


def uniform_plan(source: Source, head_dim: int) -> PruningPlan:
    """Half of the kv groups and two thirds of the channels, alike in all layers."""
    layers = []
    for index, shape in enumerate(source):
        kv_heads = tuple(range(shape.num_kv_heads // 2))
        channels = range(index, index + 2 * shape.intermediate_size // 3)
        layers.append(
            LayerPlan(
                layer=index,
                kept_query_heads=tuple(range(len(kv_heads) * shape.num_groups)),
                kept_kv_heads=kv_heads,
                kept_channels=tuple(channels),
            )
        )
    return PruningPlan(source=source, head_dim=head_dim, layers=tuple(layers))


def depth_plan(source: Source, head_dim: int) -> PruningPlan:
    """Without the second layer."""
    full = PruningPlan.full(source, head_dim)
    return PruningPlan(source=source, head_dim=head_dim, layers=(full.layers[0], *full.layers[2:]))


def halves_plan(source: Source, head_dim: int) -> PruningPlan:
    """Layers without attention, without an MLP, without either, the last one among them."""
    full = PruningPlan.full(source, head_dim).layers
    no_heads, no_channels = {"kept_query_heads": (), "kept_kv_heads": ()}, {"kept_channels": ()}
    changes: list[dict[str, Any]] = [{}, no_heads, no_channels, no_heads | no_channels]
    layers = tuple(layer.model_copy(update=changes[index % 4]) for index, layer in enumerate(full))
    return PruningPlan(source=source, head_dim=head_dim, layers=layers)


KINDS: dict[str, Callable[[Source, int], PruningPlan] | None] = {
    "dense": None,
    "uneven": lambda source, head_dim: random_plan(source, head_dim, seed=3),
    "halves": halves_plan,
    "uniform": uniform_plan,
    "depth": depth_plan,
}


def write_checkpoint(folder: Path, family: str, kind: str, **config: Any) -> PreTrainedModel:
    """Write one with its tokenizer and return the model, on four layers."""
    model, plan = tiny_model(family, layers=4, **config), None
    if (make := KINDS[kind]) is not None:
        row = family_of(model)
        plan = make(shapes(model), row.head_dim(model))
        shrink_(model, plan)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    save_checkpoint(model, tokenizer, folder, plan)
    return model
