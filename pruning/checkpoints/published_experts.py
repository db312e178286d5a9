"""Experts as checkpoints keep them: one tensor per linear and expert, where the model has one tensor for all experts.

transformers fuses them when it loads a checkpoint and takes them apart when it saves one. Here is the same by names
alone, for whoever reads or writes tensors layer by layer.

Shapes: E experts, C residual stream, I channels of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pruning.errors import PruningError

if TYPE_CHECKING:
    from pruning.checkpoints.headers import Place
    from pruning.families import ModelFamily

#: the tensors of all experts, by the linears that lie in them one below the other
_FUSED = {"gate_up_proj": (0, 1), "down_proj": (2,)}


@dataclass(frozen=True)
class ExpertPart:
    """Where a tensor of one expert belongs. fused: the model's tensor. linear: 0 gate, 1 up, 2 down."""

    fused: str
    expert: int
    linear: int


class PublishedExperts:
    """The names of a family's experts, one by one and fused; of a family without experts nothing has another name."""

    def __init__(self, family: ModelFamily) -> None:
        names = family.experts
        self._family = family
        if names is None:
            return
        layer, parts = rf"^(.*{re.escape(family.layers_path)}\.\d+\.)", "|".join(names.published_parts)
        block, module = re.escape(names.published_block), names.module_name
        self._names, self._block, self._fused = names, f"{family.mlp_name}.", f"{family.mlp_name}.{module}."
        self._one = re.compile(rf"{layer}{block}\.{module}\.(\d+)\.({parts})\.weight$")
        self._beside = re.compile(rf"{layer}{block}\.({names.router_name}\..*)$")
        self._all = re.compile(rf"{layer}{re.escape(self._fused)}({'|'.join(_FUSED)})$")
        self._router = re.compile(rf"{layer}{re.escape(self._block)}({names.router_name}\..*)$")

    def renamed(self, stored: str) -> str:
        """The model's name for a stored tensor that is not one of an expert: the router's may have another."""
        if self._family.experts is None:
            return stored
        return self._beside.sub(rf"\1{self._block}\2", stored)

    def part(self, stored: str) -> ExpertPart | None:
        """What a stored tensor is of an expert, None if it is none."""
        found = self._one.match(stored) if self._family.experts else None
        if found is None:
            return None
        linear = self._names.published_parts.index(found[3])
        fused = next(name for name, linears in _FUSED.items() if linear in linears)
        return ExpertPart(f"{found[1]}{self._fused}{fused}", int(found[2]), linear)

    def fuse(self, parts: Mapping[ExpertPart, Tensor]) -> Tensor:
        """The model's tensor from all of its parts: (E, 2 I, C) of gate and up, (E, C, I) of down."""
        linears = sorted({part.linear for part in parts})
        by_place = {(part.expert, part.linear): tensor for part, tensor in parts.items()}
        num_experts = len(parts) // len(linears)
        return torch.stack(
            [torch.cat([by_place[expert, linear] for linear in linears]) for expert in range(num_experts)]
        )

    def apart(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names as a checkpoint keeps them: those of experts one by one, as copies."""
        if self._family.experts is None:
            return dict(tensors)
        block = f"{self._names.published_block}."
        published: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            found = self._all.match(name)
            if found is None:
                published[self._router.sub(rf"\1{block}\2", name)] = tensor
                continue
            linears = _FUSED[found[2]]
            for expert, of_expert in enumerate(tensor):
                for linear, part in zip(linears, of_expert.chunk(len(linears)), strict=True):
                    module = f"{found[1]}{block}{self._names.module_name}.{expert}"
                    published[f"{module}.{self._names.published_parts[linear]}.weight"] = part.clone()
        return published


def _expected_parts(fused: str, num_experts: int) -> Sequence[ExpertPart]:
    """The parts of one of the model's tensors."""
    linears = _FUSED[fused.rpartition(".")[2]]
    return [ExpertPart(fused, expert, linear) for expert in range(num_experts) for linear in linears]


def fused_place(name: str, shape: torch.Size, parts: Mapping[ExpertPart, Place], folder: Path) -> Place:
    """The place of a weight of all experts. Raises PruningError if one of them is not there or of another shape."""
    expected = _expected_parts(name, shape[0])
    missing = [part for part in expected if part not in parts]
    if missing or len(parts) > len(expected):
        number = missing[0].expert if missing else max(part.expert for part in parts)
        raise PruningError(
            f"{folder} holds {len(parts)} of the {len(expected)} tensors of {name} for the {shape[0]} experts of its "
            f"config.json ({'lacking some' if missing else 'with one'} of expert {number}): take the config.json that "
            "belongs to the weights, or save it again"
        )
    one = torch.Size((shape[1] // len({part.linear for part in expected}), shape[2]))
    for part in expected:
        if parts[part].shape != one:
            raise PruningError(
                f"{folder} misshapes a weight, save it again: {parts[part].name} is {list(parts[part].shape)} and its "
                f"config.json says {list(one)}"
            )
    return replace(parts[expected[0]], shape=shape)
