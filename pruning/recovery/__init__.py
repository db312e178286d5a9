"""Training a pruned model back to health: one file per way, and its name is what a spec asks for.

* `lora`         adapters on instruction records, merged at the end; start here
* `_records`     records as token ids and labels
* `_resumable`   a training loop that a killed run goes on with

Each way has VERSION, Config, check_model, scratch_bytes and recover; what they share is here. The files are found by
`infra.registry`, those with an underscore are no ways. Importing one imports neither torch nor peft.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from pruning.instructions import InstructionColumns


class RecordData(InstructionColumns):
    """Where instruction records come from and what their columns are called."""

    dataset: str = "yahma/alpaca-cleaned"
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class RecoveryReport(BaseModel):
    """What a training run did.

    losses: (optimizer step, mean loss per response token of that step's batch). num_examples: examples trained on, not
    counting those without a response left after truncation. num_tokens: tokens of these examples, prompts included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[tuple[int, float], ...]
    num_steps: int
    num_examples: int
    num_tokens: int
    final_loss: float
