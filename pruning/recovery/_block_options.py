"""Options of fitting block by block, and what it came to. Importing it needs no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pruning.bounds import Count, Real


class BlockOptions(BaseModel):
    """AdamW on all weights of one block after the other. passes: over the windows, at most. batch_size: windows per
    optimizer step; micro_batch_size: per forward pass, at most.

    lookahead_weight: of the divergence between both models' next-token distributions as their heads read them after the
    next block, at `probe_positions` tokens of each window. patience: passes without a better held-out loss after which
    a block is left as it was at its best, None for never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    passes: Count = 15
    learning_rate: Real = Field(1e-4, gt=0)
    batch_size: Count = 4
    micro_batch_size: Count = 1
    lookahead_weight: Real = Field(0.05, ge=0)
    probe_positions: Count = 64
    patience: Count | None = 3


class FittedBlock(BaseModel):
    """What one block came to. before, after: its loss on the held-out windows. train_loss: mean over the last pass.
    num_steps: of the optimizer; kept_step: whose weights were kept, 0 for those it had."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: float
    after: float
    train_loss: float
    num_steps: int
    kept_step: int
