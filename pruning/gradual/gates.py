"""Compresso (arXiv 2310.05015): a gate per head and channel, trained towards a sparsity with the adapters.

Gates are hard-concrete (Louizos et al., arXiv 1712.01312, section 2.2): a stretched and clipped sigmoid of noise around
a parameter log alpha, so that a gate may be exactly 0 or 1 and still has a gradient.

Shapes: N gates, of one site or of all sites one after another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.training.objectives import CrossEntropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.gradual.masks import Factors
    from pruning.gradual.prunable import Choice, Prunable
    from pruning.training.batches import Batch

#: temperature and the ends of the stretched interval, as Louizos et al. have them
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
#: where gates begin: open, but for noise (a gate is 0 in two draws of a hundred)
OPEN = 2.5
_SMALLEST = 1e-6


def sampled(log_alpha_N: Tensor, uniform_N: Tensor) -> Tensor:
    """Gates between 0 and 1, from noise that is uniform there (equations 10 and 11)."""
    noise_N = uniform_N.clamp(_SMALLEST, 1 - _SMALLEST)
    concrete_N = torch.sigmoid((noise_N.log() - (-noise_N).log1p() + log_alpha_N) / BETA)
    return (concrete_N * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_probability(log_alpha_N: Tensor) -> Tensor:
    """That a gate is not 0 (equation 12)."""
    return torch.sigmoid(log_alpha_N - BETA * math.log(-GAMMA / ZETA))


def settled(log_alpha_N: Tensor) -> Tensor:
    """The gates without noise, as they are used after the training (equation 13)."""
    return (torch.sigmoid(log_alpha_N) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


@dataclass(frozen=True)
class Pull:
    """How gates are held to a sparsity: see pruning.methods.compresso.Config."""

    sparsity: float
    target_warmup: float
    gate_learning_rate: float
    multiplier_learning_rate: float
    penalty: float


class Gates:
    """Gates on all sites, their optimizer, and the multipliers that hold them to the sparsity."""

    def __init__(
        self, pull: Pull, prunable: Prunable, model: PreTrainedModel, num_steps: int, device: torch.device
    ) -> None:
        self._prunable, self._pull, self._num_steps = prunable, pull, num_steps
        self._counts = [site.num_groups for site in prunable.sites]
        shares = [torch.full((site.num_groups,), prunable.share_of(site)) for site in prunable.sites]
        self._shares_N = torch.cat(shares).to(device)
        self.log_alpha_N = nn.Parameter(torch.full_like(self._shares_N, OPEN))
        self._optimizer = torch.optim.Adam([self.log_alpha_N], pull.gate_learning_rate, foreach=False)
        # there from the first step on, so that the state always has the same parts
        for moment in ("exp_avg", "exp_avg_sq"):
            self._optimizer.state[self.log_alpha_N][moment] = torch.zeros_like(self.log_alpha_N)
        self._optimizer.state[self.log_alpha_N]["step"] = torch.tensor(0.0)
        self.multipliers = torch.zeros(2, dtype=torch.float64)
        self._factors = self._by_site(settled(self.log_alpha_N.detach()))
        self.objective = _Gated(self)

    def factors(self) -> Factors:
        """The gates of the last draw."""
        return self._factors

    def draw(self, *, noise: bool) -> None:
        """New gates for the forwards from here on; with noise they have gradients."""
        if noise:
            self._factors = self._by_site(sampled(self.log_alpha_N, torch.rand_like(self.log_alpha_N)))
        else:
            self._factors = self._by_site(settled(self.log_alpha_N.detach()))

    def expected_sparsity(self) -> Tensor:
        """Share of all decoder-layer parameters that closed gates take, on average over the noise; a scalar."""
        return ((1 - open_probability(self.log_alpha_N)) * self._shares_N).sum()

    def target(self, step: int) -> float:
        """The sparsity that is asked for at a step: it rises evenly, and is the final one from the warm-up on."""
        return self._pull.sparsity * min(1.0, step / max(1.0, self._pull.target_warmup * self._num_steps))

    def before_step(self, step: int) -> None:
        """Add the augmented Lagrangian's gradient to that of the loss, and let the gates go down and the multipliers
        up: l1 (s - t) + l2 (s - t)², s the expected sparsity and t its target."""
        distance = self.expected_sparsity() - self.target(step)
        first, second = self.multipliers.tolist()
        (first * distance + (second + self._pull.penalty) * distance.square()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        now = float(distance.detach())
        self.multipliers += self._pull.multiplier_learning_rate * torch.tensor([now, now * now], dtype=torch.float64)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """The expected sparsity, and the multiplier of its distance from the target."""
        return {"expected_sparsity": float(self.expected_sparsity()), "multiplier": float(self.multipliers[0])}

    def state(self) -> dict[str, Tensor]:
        """Gates, their moments, multipliers."""
        moments = self._optimizer.state[self.log_alpha_N]
        return {"log_alpha": self.log_alpha_N, "multipliers": self.multipliers, **moments}

    @torch.no_grad()
    def load_(self, state: Mapping[str, Tensor]) -> None:
        """All of it."""
        self.log_alpha_N.copy_(state["log_alpha"])
        self.multipliers = state["multipliers"].clone()
        moments = self._optimizer.state[self.log_alpha_N]
        for name, value in moments.items():
            moments[name] = state[name].clone().to(value.device)
        self.draw(noise=False)

    @torch.no_grad()
    def outcome(self) -> tuple[Choice, Factors]:
        """What goes: the gates below the threshold that meets the sparsity. The others keep the value that they have
        without noise."""
        choice = self._prunable.choose(self._by_site(self.log_alpha_N.detach()), self._pull.sparsity)
        gates = self._by_site(settled(self.log_alpha_N.detach()).cpu())
        return choice, {site.name: choice.mask(site) * gates[site.name] for site in self._prunable.sites}

    def _by_site(self, values_N: Tensor) -> dict[str, Tensor]:
        parts = torch.split(values_N, self._counts)
        return {site.name: part for site, part in zip(self._prunable.sites, parts, strict=True)}


class _Gated:
    """Cross entropy under gates: drawn anew for every batch that is trained on, without noise for what is watched."""

    def __init__(self, gates: Gates) -> None:
        self._gates, self._loss = gates, CrossEntropy()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self._gates.draw(noise=model.training)
        return self._loss(model, batch)
