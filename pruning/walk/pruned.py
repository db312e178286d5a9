"""What every pruning method returns: the plan, and what each layer paid."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pruning.plan import PruningPlan
from pruning.walk.state import SubLayerReport


class Pruned(BaseModel):
    """Outcome of a pruning method; the compensated weights are in the ledger it was given.

    achieved_sparsity: share of decoder-layer parameters that the plan removes. split: the one between attention and FFN
    that was carried out. split_kl: held-out KL (nats per token) of each split that was tried, if there was a choice.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: PruningPlan
    layers: tuple[SubLayerReport, ...] = ()
    achieved_sparsity: float
    split: str | None = None
    split_kl: dict[str, float] = {}
