"""A checkpoint of the store, loaded to be talked to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tasks.devices.placement import device_names

if TYPE_CHECKING:
    from evaluation.inference.dialogue import Dialogue, DialogueOptions


def open_dialogue(checkpoint: Path, device: str, options: DialogueOptions) -> Dialogue:
    """Load model and tokenizer from the folder `checkpoint`, in the dtype that they are stored in.

    device: the setting, as for stages; of several devices the first. Raises SettingsInvalid, PruningError, InfraError.
    """
    from evaluation.inference.dialogue import Dialogue
    from infra.models.import_model import load_tokenizer
    from pruning.checkpoints.save_load import load_checkpoint

    model = load_checkpoint(checkpoint, device=device_names(device)[0])
    return Dialogue(model, load_tokenizer(checkpoint), options)
