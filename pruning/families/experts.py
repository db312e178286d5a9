"""Mixtures of experts in the place of an MLP: the experts' linears as views of the tensors that hold all of them, which
tokens reach which expert, and the router's rows that go with an expert.

What a layer adds to the stream is a sum over experts, each output times what the router gives it: an error e of an
expert's output linear at a token counts as weight² |e|² there.

Shapes: B samples, L tokens per sample, T tokens routed to one expert, E experts, K experts of a token, C residual
stream, I channels of an expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pruning.families.family import ModelFamily


@dataclass(frozen=True)
class Routed:
    """What one expert is given. inputs_TI: of its output linear. weights_T: what the router multiplies its outputs
    with, float32."""

    expert: int
    inputs_TI: Tensor
    weights_T: Tensor


@dataclass(frozen=True)
class Experts:
    """The experts of one layer. block: the module in the place of the MLP. module: holds gate_up_proj, (E, 2 I, C), and
    down_proj, (E, C, I). router: its weight is (E, C)."""

    block: Any
    module: Any
    router: Any

    @property
    def num_experts(self) -> int:
        """As many as there are weights for."""
        return int(self.module.down_proj.shape[0])

    @property
    def size(self) -> int:
        """Channels of each."""
        return int(self.module.down_proj.shape[2])

    def output_linear(self, expert: int) -> nn.Linear:
        """I -> C of one expert: its weight is a view, so that changing it in place changes the expert."""
        weight_CI: Tensor = self.module.down_proj.detach()[expert]
        linear = nn.Linear(weight_CI.shape[1], weight_CI.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight_CI, requires_grad=False)
        return linear

    def parts(
        self, expert: int, gate_up_E2IC: Tensor | None = None, down_ECI: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weights of one expert by role (gate, up, down) as views; of other tensors of the same shapes, theirs."""
        gate_up = (self.module.gate_up_proj.detach() if gate_up_E2IC is None else gate_up_E2IC)[expert]
        down = (self.module.down_proj.detach() if down_ECI is None else down_ECI)[expert]
        return {"gate": gate_up[: self.size], "up": gate_up[self.size :], "down": down}

    @torch.no_grad()
    def routed(self, read_BLC: Tensor) -> Iterator[Routed]:
        """Of every expert the tokens that the router sends to it, of what the block reads."""
        read_TC = read_BLC.flatten(0, -2)
        _, weights_TK, experts_TK = self.router(read_TC)
        for expert in range(self.num_experts):
            token_T, place_T = (experts_TK == expert).nonzero(as_tuple=True)
            parts, given_TC = self.parts(expert), read_TC[token_T]
            gate_TI, up_TI = (nn.functional.linear(given_TC, parts[role]) for role in ("gate", "up"))
            yield Routed(expert, self.module.act_fn(gate_TI) * up_TI, weights_TK[token_T, place_T].float())

    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them, with the router's."""
        return self.module.gate_up_proj, self.module.down_proj, self.router.weight


def experts_of(family: ModelFamily, layer: nn.Module) -> Experts | None:
    """The experts of a layer, None if it has an MLP."""
    names, block = family.experts, family.mlp(layer)
    if names is None or not family.has_experts(layer):
        return None
    return Experts(block, getattr(block, names.module_name), getattr(block, names.router_name))


@torch.no_grad()
def cut_experts_(experts: Experts, kept: Mapping[int, Sequence[int]]) -> None:
    """Keep these experts, and of each these channels, equally many; the router keeps their rows and sends a token to no
    more experts than are left."""
    module, router, size = experts.module, experts.router, experts.size
    device = module.down_proj.device
    gate_up, down = [], []
    for expert, channels in kept.items():
        kept_K = torch.tensor(channels, dtype=torch.int64, device=device)
        gate_up.append(module.gate_up_proj[expert].index_select(0, torch.cat([kept_K, size + kept_K])))
        down.append(module.down_proj[expert].index_select(1, kept_K))
    for owner, name, taken in (
        (module, "gate_up_proj", torch.stack(gate_up)),
        (module, "down_proj", torch.stack(down)),
        (router, "weight", router.weight[torch.tensor(list(kept), device=router.weight.device)]),
    ):
        setattr(owner, name, nn.Parameter(taken, requires_grad=getattr(owner, name).requires_grad))
    if isinstance(router, _RoutesToKept):
        _unmask_router_(router)
    module.num_experts, module.intermediate_dim = experts.num_experts, experts.size
    router.num_experts = experts.num_experts
    for owner in (router, experts.block):
        if hasattr(owner, "top_k"):
            owner.top_k = min(owner.top_k, experts.num_experts)


@torch.no_grad()
def mask_experts_(experts: Experts, kept: Mapping[int, Sequence[int]]) -> None:
    """Zero all channels but these and let the router send tokens to these experts alone; shapes stay."""
    for expert in range(experts.num_experts):
        gone_I = torch.ones(experts.size, dtype=torch.bool, device=experts.module.down_proj.device)
        gone_I[list(kept.get(expert, ()))] = False
        parts = experts.parts(expert)
        parts["gate"][gone_I], parts["up"][gone_I] = 0, 0
        parts["down"][:, gone_I] = 0
    mask_router_(experts, kept)


def mask_router_(experts: Experts, kept: Collection[int]) -> None:
    """Let the router send tokens to these experts alone, as it would without the rows of the others."""
    router: Any = experts.router
    if len(kept) == experts.num_experts:
        return
    router.kept_E = torch.tensor(sorted(kept), dtype=torch.int64)
    masked = isinstance(router, _RoutesToKept)
    if not masked:
        router.__class__ = _class_routing_to_kept(type(router))  # type: ignore[arg-type]


def _unmask_router_(router: Any) -> None:
    router.__class__ = router.stock_class
    del router.kept_E


class _RoutesToKept:
    """A router that knows some of its rows only; goes before the stock one."""

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept_E = self.kept_E.to(self.weight.device)
        return route(self, self.stock_class, self.weight[kept_E], kept_E, hidden_states)


def route(
    router: Any, stock_class: Any, rows_EC: Tensor, kept_E: Tensor, hidden_states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a router with these rows alone gives (logits, weights, experts), the experts being called `kept_E`."""
    cut = _Cut(router, weight=rows_EC, top_k=min(router.top_k, len(kept_E)), num_experts=len(kept_E))
    logits, weights_TK, experts_TK = stock_class.forward(cut, hidden_states)
    return logits, weights_TK, kept_E[experts_TK]


class _Cut:
    """A router but for some of its attributes."""

    def __init__(self, router: Any, **changed: Any) -> None:
        self.__dict__ |= {"router": router, **changed}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["router"], name)


@cache
def _class_routing_to_kept(router_class: type) -> type:
    bases = (_RoutesToKept, router_class)
    return type(f"{router_class.__name__}ToKept", bases, {"stock_class": router_class})


def channel_places(expert: int, size: int, channels: Sequence[int]) -> tuple[int, ...]:
    """Channels of an expert as a plan counts them: through all experts of the layer."""
    return tuple(expert * size + channel for channel in channels)


def experts_module(family: ModelFamily, layer: nn.Module) -> Experts:
    """The experts of a layer that has them."""
    experts = experts_of(family, layer)
    assert experts is not None, f"a layer without experts in a {family.name} model"
    return experts
