"""LoRAPrune (arXiv 2305.18403): what groups are worth, from the gradients of the adapters alone, and how many go when.

Shapes: O outputs, I inputs, R rank of a linear's adapter; N groups of a site.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pruning.errors import PruningError
from pruning.training.adapters import LowRank, low_rank
from pruning.training.objectives import CrossEntropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pruning.families.projection import Projection
    from pruning.families.sites import Site
    from pruning.gradual.masks import Factors
    from pruning.gradual.prunable import Choice, Prunable

#: whose rows belong to a group of each kind, and whose columns
_ROWS = {"kv_group": ("q", "k", "v"), "query_head": ("q",), "channel": ("gate", "up")}
_COLUMNS = {"kv_group": "o", "query_head": "o", "channel": "down"}


def estimated_gradient(a_RI: Tensor, b_OR: Tensor, grad_a_RI: Tensor, grad_b_OR: Tensor) -> Tensor:
    """Of the merged weight, up to a factor, (O, I): how B A changes if both take a step of 1 down their
    gradients."""
    return grad_b_OR @ a_RI + b_OR @ grad_a_RI - grad_b_OR @ grad_a_RI


@torch.no_grad()
def importance(adapter: LowRank) -> Tensor:
    """(gradient * weight)² of every merged weight, (O, I) float32: what the loss would change if it were 0."""
    a_RI, b_OR = adapter.a_RI.float(), adapter.b_OR.float()
    assert adapter.a_RI.grad is not None, "asked for after the backward pass"
    assert adapter.b_OR.grad is not None, "and of both"
    gradient_OI = estimated_gradient(a_RI, b_OR, adapter.a_RI.grad.float(), adapter.b_OR.grad.float())
    weight_OI = adapter.weight_OI.float() + adapter.scaling * b_OR @ a_RI
    return (gradient_OI * weight_OI).square()


def coupled(site: Site, importances: Mapping[str, Tensor]) -> Tensor:
    """Sums over all weights that go with each group of a site, (N,) float64.

    importances: by role (q, k, v, o, gate, up, down), of those linears that are adapted, (O, I).
    """
    sums = [importances[role].sum(1) for role in _ROWS[site.unit] if role in importances]
    sums += [importances[role].sum(0) for role in (_COLUMNS[site.unit],) if role in importances]
    return torch.stack([each.double().reshape(site.num_groups, -1).sum(1) for each in sums]).sum(0)


def rising_ratio(share: float, first: float, last: float) -> float:
    """How much of the target is masked when `share` of the steps are done: 0 up to `first`, all from `last` on, and a
    cubic between that begins steep."""
    if share >= last:
        return 1.0
    done = max(0.0, share - first) / (last - first)
    return 1 - (1 - done) ** 3


@dataclass(frozen=True)
class Pace:
    """decay: of the moving average. first, last: shares of the steps at which the first group and the last ones go."""

    sparsity: float
    decay: float
    first: float
    last: float


class LoraImportance:
    """The state of LoRAPrune beside the adapters: a moving average of what groups are worth, and the masks that follow
    from it. Raises PruningError where nothing says what a site's groups are worth."""

    def __init__(
        self, pace: Pace, prunable: Prunable, model: PreTrainedModel, num_steps: int, device: torch.device
    ) -> None:
        self._prunable, self._pace, self._num_steps = prunable, pace, num_steps
        layers = prunable.family.layers(model)
        self._rows = {site.name: _coupled_rows(prunable, layers[site.layer], site) for site in prunable.sites}
        self.average: dict[str, Tensor] = {
            site.name: torch.zeros(site.num_groups, dtype=torch.float64, device=device) for site in prunable.sites
        }
        self._factors = {name: torch.ones_like(each, dtype=torch.float32) for name, each in self.average.items()}
        self._step = 0
        self._sparsity = 0.0
        self.objective = CrossEntropy()

    def factors(self) -> Factors:
        """1 for what computes, 0 for what is masked."""
        return self._factors

    def before_step(self, step: int) -> None:
        """Look at the gradients, and mask as many groups as are due after this step."""
        for site in self._prunable.sites:
            found, decay = self._importances(site), self._pace.decay
            self.average[site.name] = decay * self.average[site.name] + (1 - decay) * coupled(site, found)
        self._mask(step)

    def figures(self) -> dict[str, float]:
        """The share of all decoder-layer parameters that is masked."""
        return {"sparsity": self._sparsity}

    def state(self) -> dict[str, Tensor]:
        """The moving averages; masks follow from them."""
        return {**self.average, "step": torch.tensor(self._step)}

    def load_(self, state: Mapping[str, Tensor]) -> None:
        """Masks included."""
        self.average = {name: state[name].to(each.device) for name, each in self.average.items()}
        self._mask(int(state["step"]))

    def outcome(self) -> tuple[Choice, Factors]:
        """What goes in the end; nothing that stays is scaled."""
        choice = self._prunable.choose(self.average, self._pace.sparsity)
        return choice, {site.name: choice.mask(site) for site in self._prunable.sites}

    def _mask(self, step: int) -> None:
        ratio = rising_ratio(step / self._num_steps, self._pace.first, self._pace.last)
        choice = self._prunable.choose(self.average, ratio * self._pace.sparsity)
        for site in self._prunable.sites:
            self._factors[site.name] = choice.mask(site).to(self._factors[site.name].device)
        self._step, self._sparsity = step, choice.sparsity

    def _importances(self, site: Site) -> dict[str, Tensor]:
        """Of the weights that go with the site's groups, by role, (O, I), as far as they are adapted."""
        rows = self._rows[site.name]
        adapters = {each.linear: low_rank(each.linear) for each in rows.values()}  # a fused linear once
        of_linear = {linear: importance(adapter) for linear, adapter in adapters.items() if adapter is not None}
        return {role: each.rows_of(of_linear[each.linear]) for role, each in rows.items() if each.linear in of_linear}


def _coupled_rows(prunable: Prunable, layer: nn.Module, site: Site) -> dict[str, Projection]:
    roles = (*_ROWS[site.unit], _COLUMNS[site.unit])
    rows = {role: each for role, each in prunable.family.projections(layer).items() if role in roles}
    if not any(low_rank(each.linear) for each in rows.values()):
        what = "heads" if site.kind == "attention" else "channels"
        raise PruningError(
            f"none of the targets says what the {what} of {site.name} are worth: add one of "
            f"{', '.join(rows)} to targets, or take them out of the pruning with split"
        )
    return rows
