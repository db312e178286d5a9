"""What to time. Importable without torch, so that a spec can hold it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ProfileConfig(BaseModel):
    """A forward pass over a prompt, then greedy decoding, repeated; with the attention implementation the model has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_size: int = Field(default=1, ge=1)
    prompt_len: int = Field(default=128, ge=1)
    """Random token ids of the prompt."""

    new_tokens: int = Field(default=32, ge=1)
    """Tokens decoded after the prompt, one at a time; an end-of-sequence token does not stop it."""

    warmup: int = Field(default=2, ge=0)
    """Runs before the timed ones."""

    runs: int = Field(default=5, ge=1)
    """Timed runs."""

    seed: int = 0
    """Draws the prompt."""
